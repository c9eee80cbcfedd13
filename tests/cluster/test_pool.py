"""The pool on scripted engines in real Ray actors."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from cluster.config import ModelConfig
from cluster.engines.config import Completion, EngineConfig, EngineReport, GenerationRequest, Sampling
from cluster.engines.dispatch import Engine
from cluster.engines.health import EngineHealth
from cluster.engines.placement import fit_to_cluster
from cluster.engines.pool import EnginePool
from cluster.engines.pool_stats import EngineStats
from cluster.errors import InputError, TunesmithError
from tests.fakes import continue_prompt, generated_ids, scripted, write_script

pytestmark = pytest.mark.usefixtures("ray_cluster")
SAMPLING = Sampling()


def prompts(num: int) -> list[GenerationRequest]:
    return [GenerationRequest(f"request-{i}", f"prompt {i} ", SAMPLING) for i in range(num)]


def in_pool(config: EngineConfig, model: ModelConfig, use: Callable[[EnginePool], Awaitable]):
    async def main():
        async with EnginePool.start(config, model) as pool:
            return await use(pool)

    return asyncio.run(main())


def complete_all(config: EngineConfig, model: ModelConfig, requests: list[GenerationRequest]):
    """Completions and statistics of one pool that gets all requests at once."""

    async def use(pool: EnginePool):
        return await asyncio.gather(*map(pool.generate, requests)), pool.stats

    return in_pool(config, model, use)


def assert_each_has_its_own_answer(requests: list[GenerationRequest], completions: list[Completion]) -> None:
    for request, completion in zip(requests, completions, strict=True):
        assert completion.request_id == request.request_id
        assert completion.text == continue_prompt(request.prompt, SAMPLING.model_dump_json())


def test_each_caller_gets_its_own_answer_in_any_order(tmp_path):
    requests = prompts(200)
    model = write_script(tmp_path / "model", latency_ms=20)
    completions, stats = complete_all(scripted(num_replicas=3, max_num_seqs=8), model, requests)
    assert_each_has_its_own_answer(requests, completions)
    assert stats.num_requests == 200
    assert stats.num_completion_tokens == sum(completion.num_completion_tokens for completion in completions)
    assert sorted(generated_ids(tmp_path / "model")) == sorted(request.request_id for request in requests)


def test_as_many_engines_as_ray_has_room_for() -> None:
    num_cpus = int(ray.cluster_resources()["CPU"])
    fits = fit_to_cluster(EngineConfig(num_replicas=num_cpus + 3, min_replicas=num_cpus + 2))
    assert (fits.num_replicas, fits.min_replicas) == (num_cpus, num_cpus)
    assert fit_to_cluster(EngineConfig(num_replicas=3, cpus_per_engine=num_cpus + 1)).num_replicas == 1
    assert fit_to_cluster(EngineConfig()) == EngineConfig()


def test_an_engine_holds_at_most_max_in_flight_requests(tmp_path):
    model = write_script(tmp_path / "model", latency_ms=5)
    config = scripted(num_replicas=2, max_num_seqs=5)
    _, stats = complete_all(config, model, prompts(100))
    assert stats.max_in_flight == config.max_in_flight == 10


def test_a_slow_request_does_not_delay_its_chunk(tmp_path):
    model = write_script(tmp_path / "model", stall="prompt 3 ")
    requests = prompts(8)

    async def use(pool: EnginePool):
        calls = [asyncio.create_task(pool.generate(request)) for request in requests]
        done = await asyncio.gather(*(call for i, call in enumerate(calls) if i != 3))
        return done, calls[3].done()

    done, slow_is_done = in_pool(scripted(chunk_size=8), model, use)
    assert [completion.request_id for completion in done] == [f"request-{i}" for i in range(8) if i != 3]
    assert not slow_is_done


def test_requests_of_a_dead_engine_are_answered_by_others(tmp_path):
    requests = prompts(150)
    model = write_script(tmp_path / "model", latency_ms=10, die_at=[20, 60, 90])
    completions, stats = complete_all(scripted(num_replicas=2, max_num_seqs=8), model, requests)
    assert_each_has_its_own_answer(requests, completions)
    assert stats.num_restarts == 3
    assert stats.num_quarantined == 0


def test_only_a_request_that_kills_engines_is_quarantined(tmp_path):
    model = write_script(tmp_path / "model", poison="prompt 17 ")
    config = scripted(num_replicas=2, max_num_seqs=16)
    requests = prompts(100)
    completions, stats = complete_all(config, model, requests)
    poisoned = completions.pop(17)
    assert (poisoned.request_id, poisoned.finish_reason, poisoned.text) == ("request-17", "engine_died", "")
    del requests[17]
    assert_each_has_its_own_answer(requests, completions)
    assert (stats.num_quarantined, stats.num_restarts) == (1, config.max_request_deaths)


def test_a_hung_engine_is_replaced(tmp_path):
    model = write_script(tmp_path / "model", stall="prompt 2 ")
    config = scripted(max_num_seqs=4, stall_timeout_seconds=1)
    completions, stats = complete_all(config, model, prompts(6))
    assert [completion.finish_reason for completion in completions] == ["stop"] * 2 + ["engine_died"] + ["stop"] * 3
    assert "generated no token" in stats.last_death
    assert (stats.num_restarts_hung, stats.num_restarts_dead) == (config.max_request_deaths, 0)
    assert list(stats.quarantined) == ["request-2"] and "generated no token" in stats.quarantined["request-2"]


def test_an_engine_that_generates_tokens_but_finishes_nothing_is_not_hung(tmp_path):
    model = write_script(tmp_path / "model", trickle="prompt 0 ")  # three seconds
    completions, stats = complete_all(scripted(stall_timeout_seconds=1), model, prompts(1))
    assert completions[0].finish_reason == "stop"
    assert stats.num_restarts == 0


def test_a_slow_engine_gets_fewer_requests_and_stays(tmp_path):
    model = write_script(tmp_path / "model", ms_per_token=20, slow_ms_per_token=500)
    config = scripted(num_replicas=2, max_num_seqs=8, slow_window_seconds=1)
    seen = []

    async def use(pool: EnginePool):
        while pool.stats.num_engines < 2:
            await asyncio.sleep(0.05)
        calls = [asyncio.create_task(pool.generate(request)) for request in prompts(800)]
        while not any(engine.num_slow_windows for engine in pool.stats.engines) and pool.stats.num_requests < 800:
            await asyncio.sleep(0.05)
        seen.append(pool.stats.num_slow)
        return await asyncio.gather(*calls), pool.stats

    completions, stats = in_pool(config, model, use)
    assert_each_has_its_own_answer(prompts(800), completions)
    assert seen == [1] and stats.num_restarts == 0
    slow, fast = sorted(stats.engines, key=lambda engine: engine.num_requests)
    assert slow.num_slow_windows and not fast.num_slow_windows
    assert slow.num_requests < fast.num_requests / 2


def test_every_text_is_an_answer(tmp_path):
    texts = {"prompt 0 ": "", "prompt 1 ": "\0\ufffd\u202e\n\n### ###", "prompt 2 ": "on and " * 1000}
    model = write_script(tmp_path / "model", answers=texts)
    completions, stats = complete_all(scripted(), model, prompts(4))
    assert [each.finish_reason for each in completions] == ["stop", "stop", "length", "stop"]
    assert [each.text for each in completions[:2]] == [texts["prompt 0 "], texts["prompt 1 "]]
    assert completions[2].num_completion_tokens == SAMPLING.max_tokens
    assert stats.num_requests == 4


def test_a_request_gets_all_its_samples(tmp_path):
    sampling = Sampling(n=3)
    requests = [GenerationRequest(f"request-{number}", f"prompt {number} ", sampling) for number in range(20)]
    completions, stats = complete_all(scripted(max_num_seqs=8), write_script(tmp_path / "model"), requests)
    assert all(len({sample.text for sample in each.samples}) == 3 for each in completions)
    assert stats.num_completion_tokens == sum(sample.num_tokens for each in completions for sample in each.samples)


def test_statistics_of_engines_add_up_to_the_pools(tmp_path):
    model = write_script(tmp_path / "model", latency_ms=20, die_at=[50])
    _, stats = complete_all(scripted(num_replicas=2, max_num_seqs=8), model, prompts(150))
    for name in ("num_requests", "num_prompt_tokens", "num_completion_tokens", "num_restarts_dead"):
        assert getattr(stats, name) == sum(getattr(engine, name) for engine in stats.engines)
    assert (stats.num_requests, stats.num_restarts_dead, stats.num_restarts_hung) == (150, 1, 0)
    assert stats.num_generated_tokens >= stats.num_completion_tokens
    assert stats.seconds_in_engine > 0 and stats.seconds_queued > 0 and stats.seconds_lost > 0
    assert stats.seconds_in_engine == pytest.approx(sum(engine.seconds_in_engine for engine in stats.engines))


def test_an_adapter_that_cannot_be_served_is_bad_input(tmp_path):
    model = write_script(tmp_path / "model")
    (tmp_path / "adapter").mkdir()

    def start(config: EngineConfig, **adapter: object) -> None:
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
        asyncio.run(EnginePool.start(config, model, (str(tmp_path / "adapter"),)).__aenter__())

    with pytest.raises(InputError, match=r"it has no adapter_config\.json"):
        asyncio.run(EnginePool.start(scripted(), model, (str(tmp_path),)).__aenter__())
    with pytest.raises(InputError, match=r"with modules_to_save\)\. Merge it into the model"):
        start(scripted(), peft_type="LORA", r=8, modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"peft_type PREFIX_TUNING"):
        start(scripted(), peft_type="PREFIX_TUNING")
    with pytest.raises(InputError, match=r"rank 64 is more than engine\.max_lora_rank=16"):
        start(scripted(max_lora_rank=16), peft_type="LORA", r=8, rank_pattern={"q_proj": 64})
    with pytest.raises(InputError, match=r"rank 1024 is more than vLLM serves, 512"):
        start(scripted(), peft_type="LORA", r=1024)


def test_an_adapter_that_the_engines_do_not_have_is_bad_input(tmp_path):
    request = GenerationRequest("request", "prompt", SAMPLING, adapter="elsewhere")
    with pytest.raises(InputError, match="names the adapter elsewhere, but the engines were started with none"):
        complete_all(scripted(), write_script(tmp_path / "model"), [request])


def test_a_prompt_too_long_is_an_outcome(tmp_path):
    model = write_script(tmp_path / "model")
    requests = [GenerationRequest("long", "word " * 11, SAMPLING), GenerationRequest("short", "word " * 10, SAMPLING)]
    (long, short), _ = complete_all(scripted(max_model_len=10), model, requests)
    assert (long.finish_reason, short.finish_reason) == ("prompt_too_long", "stop")


def test_an_error_of_the_engine_reaches_its_caller_only(tmp_path):
    model = write_script(tmp_path / "model", refuse="prompt 1 ")

    async def use(pool: EnginePool):
        return await asyncio.gather(*map(pool.generate, prompts(3)), return_exceptions=True)

    first, refused, last = in_pool(scripted(), model, use)
    assert isinstance(refused, TunesmithError)
    assert "request-1" in str(refused) and "no such thing" in str(refused)
    assert first.finish_reason == last.finish_reason == "stop"


def test_the_pool_works_on_when_a_caller_leaves(tmp_path):
    model = write_script(tmp_path / "model", stall="prompt 0 ")
    requests = prompts(5)

    async def use(pool: EnginePool):
        stalled = [asyncio.create_task(pool.generate(requests[0])) for _ in range(2)]
        answered = await pool.generate(requests[1])  # so the stalled ones are on the engine by now
        for call in stalled:
            call.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)
        return [answered, *await asyncio.gather(*map(pool.generate, requests[2:]))]

    completions = in_pool(scripted(max_num_seqs=2, stall_timeout_seconds=60), model, use)
    assert_each_has_its_own_answer(requests[1:], completions)


@pytest.mark.parametrize("num_turns", range(6))
def test_a_cancellation_that_comes_with_an_answer_is_not_lost(tmp_path, num_turns):
    """Cancel the collecting task at each turn of the event loop around the moment an answer comes."""

    async def main():
        answers = iter([asyncio.get_running_loop().create_future() for _ in range(2)])
        first = next(answers)
        refs = iter([first, *answers])
        actor = SimpleNamespace(collect=SimpleNamespace(remote=lambda _seconds: next(refs)))
        config = scripted()
        pool = EnginePool(config, write_script(tmp_path / "model"))
        engine = Engine(actor, EngineHealth(config), EngineStats(), max_in_flight=1, max_concurrency=1)
        collecting = asyncio.create_task(pool._collect(engine))
        await asyncio.sleep(0)
        first.set_result(([], EngineReport()))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        collecting.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        was_done = collecting.done()
        collecting.cancel()
        return was_done

    assert asyncio.run(main())


def test_without_any_engine_the_start_fails_with_the_cause(tmp_path):
    model = write_script(tmp_path / "model", fail_start="not enough memory for the cache")
    with pytest.raises(TunesmithError, match=r"no engine came up: ValueError: not enough memory for the cache\. Check"):
        complete_all(scripted(num_replicas=2), model, prompts(1))


def test_every_caller_gets_the_error_when_the_last_engine_has_died(tmp_path):
    model = write_script(tmp_path / "model", poison="prompt")

    async def use(pool: EnginePool):
        return await asyncio.gather(*map(pool.generate, prompts(20)), return_exceptions=True)

    results = in_pool(scripted(max_restarts=0, max_request_deaths=2), model, use)
    assert all(isinstance(result, TunesmithError) and "no engine is left" in str(result) for result in results)


def test_too_few_nodes_after_waiting_for_them_is_bad_input(tmp_path):
    config = scripted(num_replicas=500, min_replicas=400, cpus_per_engine=1, start_timeout_seconds=1)
    with pytest.raises(InputError, match=r"engine\.min_replicas=400 with 1 CPU each needs 400 CPUs"):
        complete_all(config, write_script(tmp_path / "model"), [])


def test_with_min_replicas_the_pool_starts_on_a_small_cluster(tmp_path):
    config = scripted(num_replicas=50, min_replicas=1, cpus_per_engine=1)
    completions, stats = complete_all(config, write_script(tmp_path / "model", latency_ms=20), prompts(50))
    assert_each_has_its_own_answer(prompts(50), completions)
    assert 1 <= stats.num_engines < 50


def test_a_pool_larger_than_the_cluster_is_bad_input(tmp_path):
    model = write_script(tmp_path / "model")
    with pytest.raises(InputError, match=r"engine\.num_replicas=500 with 1 CPU each needs 500 CPUs, but this Ray has"):
        complete_all(scripted(num_replicas=500, cpus_per_engine=1), model, [])


@pytest.mark.parametrize(
    ("path", "message"),
    [("./nowhere", "there is no folder"), ("a/b/c", "org/name"), ("{empty}", "holds no config.json")],
)
def test_a_missing_model_is_bad_input(tmp_path: Path, path: str, message: str):
    with pytest.raises(InputError, match=message):
        EnginePool(scripted(), ModelConfig(path=path.format(empty=tmp_path)))
