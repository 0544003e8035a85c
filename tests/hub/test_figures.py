from hf_ddpm.hub.figures import rows


def figure(**sampling):
    settings = {"scheduler": "ddpm", "num_inference_steps": 50, "eta": 0.0, "seed": 0, "guidance_scale": 1.0}
    return {
        "value": 2.0,
        "num_images": 10,
        "made_by": {
            "device": "cpu",
            "dataset": {"name": "digits", "reference_split": "train"},
            "extractor": {"name": "digits", "checksum": "0" * 64},
            "sampling": settings | {"class_labels": []} | sampling,
        },
    }


def test_replaced_variance_is_shown():
    (replaced,), (own,) = (list(rows({"fd": figure(**more)})) for more in ({"variance": "fixed_small"}, {}))
    assert replaced.arguments == own.arguments | {"variance": "fixed_small"}
    assert "variance fixed_small" in replaced.how and "variance" not in own.how
