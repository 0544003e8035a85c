import threading

import pytest
import torch

from hf_ddpm.demo.preview import FRAMES, in_background, watch
from tests.conftest import LIMIT


def test_items_arrive_in_order_from_another_thread():
    threads = set()

    def work(emit):
        threads.add(threading.current_thread())
        for item in range(100):
            emit(item)

    assert list(in_background(work)) == list(range(100))
    assert threads and threading.current_thread() not in threads


def test_error_of_work_is_raised_after_its_items():
    def work(emit):
        emit(1)
        raise ValueError("no more")

    items = in_background(work)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_work_ends_when_iterator_is_closed():
    emitted, permits, ended = [], threading.Semaphore(0), threading.Event()

    def work(emit):
        try:
            for item in range(1000):
                permits.acquire(timeout=LIMIT)
                emit(item)
                emitted.append(item)
        finally:
            ended.set()

    items = in_background(work)
    permits.release()
    assert next(items) == 0
    items.close()
    permits.release()
    assert ended.wait(LIMIT)
    assert emitted == [0]


@pytest.mark.parametrize("steps", [1, 3, 7, 8, 50])
def test_frames_are_evenly_spaced_from_first_step_to_last(steps, monkeypatch):
    # The estimate after i steps is gray level i, so pixels identify the preview.
    monkeypatch.setattr("hf_ddpm.demo.preview.PAUSE", float("inf"))

    class Chain:
        num_timesteps = steps

    def work(callback_on_step_end, callback_on_step_end_tensor_inputs):
        assert {"latents", "pred_original_sample"} <= set(callback_on_step_end_tensor_inputs)
        for i in range(steps):
            gray = torch.full((2, 1, 1, 1), i / 255) * 2 - 1
            callback_on_step_end(Chain, i, None, {"latents": None, "pred_original_sample": gray})
        return torch.full((2, 1, 1, 1), steps, dtype=torch.uint8)

    previews = list(watch(work))
    frame_steps = [preview.step for preview in previews]
    assert frame_steps[0] == 0 and frame_steps[-1] == steps and len(frame_steps) == min(FRAMES, steps + 1)
    gaps = [after - before for before, after in zip(frame_steps[:-1], frame_steps[1:], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    for index, preview in enumerate(previews):
        assert preview.steps == steps and preview.frame_steps == frame_steps
        assert preview.images.dtype == torch.uint8 and preview.images.flatten().tolist() == [preview.step] * 2
        assert [int(frame[0]) for frame in preview.frames] == frame_steps[: index + 1]
