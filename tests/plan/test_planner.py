import dataclasses
import re

import pytest

from training_framework.config import TrainConfig
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.plan import make_plan

FACTS = DatasetFacts(
    name="cifar10",
    train_images=50_000,
    val_images=10_000,
    class_names=tuple("abcdefghij"),
    image_size=32,
    storage="arrays",
    array_bytes=60_000 * 3072,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    crop_padding=4,
)
CPU = Hardware(
    cpu_name="plain CPU",
    cores=8,
    instruction_sets=("avx2",),
    memory_bytes=16 * 2**30,
    accelerators=(),
)
NATIVE_CPU = dataclasses.replace(CPU, instruction_sets=("avx512",), cpp_compiler="g++", glibc=True)
OLD_GPU = Accelerator(
    kind="cuda", name="GeForce GTX 1080", memory_bytes=8 * 2**30, fault="has capability 6.1; cure"
)
NEW_GPU = Accelerator(kind="cuda", name="NVIDIA H200", memory_bytes=140 * 2**30, bf16=True)
FP16_GPU = Accelerator(kind="cuda", name="Tesla V100", memory_bytes=16 * 2**30)


def plan(hardware=CPU, facts=FACTS, world_size=1, local_world_size=1, batches=None, **settings):
    return make_plan(
        TrainConfig(**settings),
        hardware,
        facts,
        world_size=world_size,
        local_world_size=local_world_size,
        batches_per_epoch=batches,
    )


def with_gpus(*gpus):
    return dataclasses.replace(CPU, accelerators=gpus)


def reason(made, name):
    return next(choice.reason for choice in made.choices if choice.name == name)


def test_a_gpu_without_kernels_is_named_and_the_run_goes_on_on_the_cpu():
    made = plan(with_gpus(OLD_GPU))
    assert made.device == "cpu"
    assert "GeForce GTX 1080 has capability 6.1" in reason(made, "device")


def test_asking_for_a_gpu_without_kernels_is_an_error_with_the_cure():
    with pytest.raises(UserError, match=r"GTX 1080 has capability 6.1; cure; use accelerator"):
        plan(with_gpus(OLD_GPU), accelerator="gpu")


def test_a_usable_gpu_beside_an_unusable_one_is_the_one_used():
    second = dataclasses.replace(NEW_GPU, index=1)
    made = plan(with_gpus(OLD_GPU, second))
    assert (made.device, made.device_indices) == ("cuda", (1,))
    assert str(made.torch_device(0)) == "cuda:1"


@pytest.mark.parametrize(
    ("hardware", "asked", "planned"),
    [
        (CPU, "auto", "32"),
        (CPU, "mixed", "bf16-mixed"),
        (CPU, "16-mixed", "16-mixed"),
        (dataclasses.replace(CPU, instruction_sets=("amx",)), "auto", "bf16-mixed"),
        (dataclasses.replace(CPU, instruction_sets=("avx512_bf16",)), "auto", "bf16-mixed"),
        (with_gpus(NEW_GPU), "auto", "bf16-mixed"),
        (with_gpus(FP16_GPU), "auto", "16-mixed"),
        (with_gpus(FP16_GPU), "mixed", "16-mixed"),
        (with_gpus(NEW_GPU), "32", "32"),
        (with_gpus(Accelerator(kind="mps", name="M3")), "auto", "32"),
    ],
)
def test_precision_follows_what_the_device_computes(hardware, asked, planned):
    made = plan(hardware, precision=asked)
    assert made.precision == planned
    assert reason(made, "precision")


def test_emulated_precision_is_called_slow():
    assert "emulates bf16" in reason(plan(precision="bf16-mixed"), "precision")
    bf16_cpu = dataclasses.replace(CPU, instruction_sets=("amx",))
    assert "emulates" not in reason(plan(bf16_cpu, precision="bf16-mixed"), "precision")


def test_a_cpu_does_not_choose_bf16_where_its_gradients_are_wrong():
    fast = dataclasses.replace(CPU, instruction_sets=("avx512_bf16",), bf16_speed=1.9)
    tiny = plan(fast, stem="imagenet", facts=dataclasses.replace(FACTS, image_size=16))
    assert tiny.precision == "32"
    assert "gradients" in reason(tiny, "precision")
    larger = dataclasses.replace(FACTS, image_size=17)
    assert plan(fast, stem="imagenet", facts=larger).precision == "bf16-mixed"
    growing = plan(fast, stem="imagenet", facts=larger, progressive_resolution=((0.0, 16),))
    assert growing.precision == "32"


def test_bf16_goes_into_winograds_products_where_a_network_consists_of_them():
    fast = dataclasses.replace(
        NATIVE_CPU, instruction_sets=("avx512", "avx512_bf16"), bf16_speed=1.9
    )
    made = plan(fast)
    assert (made.precision, made.winograd_convolutions, made.bf16_products) == ("32", True, True)
    assert not plan(fast, precision="32").bf16_products
    slow = plan(dataclasses.replace(fast, bf16_speed=0.5))
    assert slow.winograd_convolutions and not slow.bf16_products
    everywhere = (
        plan(fast, model="resnet50"),  # half of its products are in 1x1 convolutions
        plan(fast, bf16_products=False),
        plan(fast, winograd_convolutions=False),
        plan(dataclasses.replace(fast, cpp_compiler=None)),
        plan(dataclasses.replace(fast, instruction_sets=("avx512", "amx"))),
    )
    assert {made.precision for made in everywhere} == {"bf16-mixed"}
    assert not any(made.bf16_products for made in everywhere)


def test_bf16_products_that_are_asked_for_say_where_they_are_slow_or_useless():
    made = plan(NATIVE_CPU, bf16_products=True)
    assert made.bf16_products
    assert reason(made, "bf16_products") == "asked for; this CPU is slow at it"
    made = plan(NATIVE_CPU, bf16_products=True, winograd_convolutions=False)
    assert not made.bf16_products
    assert reason(made, "bf16_products") == "only works in Winograd's convolutions"


def test_bf16_instructions_count_where_they_are_measured_to_be_fast():
    slow = dataclasses.replace(CPU, instruction_sets=("avx512_bf16",), bf16_speed=0.5)
    assert plan(slow).precision == "32"
    assert "0.5x the speed of fp32, measured" in reason(plan(slow), "precision")
    assert plan(slow, precision="mixed").precision == "bf16-mixed"
    assert "0.5x the speed of fp32 here" in reason(plan(slow, precision="mixed"), "precision")
    fast = dataclasses.replace(slow, bf16_speed=1.9)
    assert plan(fast).precision == "bf16-mixed"
    assert "1.9x the speed of fp32, measured" in reason(plan(fast), "precision")


GTX_1080 = Accelerator(kind="cuda", name="GTX 1080", capability=(6, 1))
GTX_1650 = Accelerator(kind="cuda", name="GTX 1650", capability=(7, 5))
V100 = dataclasses.replace(FP16_GPU, capability=(7, 0))


@pytest.mark.parametrize("gpu", [GTX_1080, GTX_1650])
def test_gpus_without_tensor_cores_get_fp32_in_pytorchs_own_layout(gpu):
    made = plan(with_gpus(gpu))
    assert (made.precision, made.channels_last) == ("32", False)
    assert "no tensor cores" in reason(made, "precision")
    assert "no tensor cores" in reason(plan(with_gpus(gpu), precision="16-mixed"), "precision")
    assert plan(with_gpus(gpu), channels_last=True).channels_last


def test_bf16_where_the_gpu_does_not_compute_it_says_so():
    made = plan(with_gpus(V100), precision="bf16-mixed")
    assert "Tesla V100 does not compute bf16 itself, and precision 16-mixed is faster" in reason(
        made, "precision"
    )
    assert reason(plan(with_gpus(NEW_GPU), precision="bf16-mixed"), "precision") == "asked for"
    assert plan(with_gpus(V100)).channels_last


def test_a_long_run_is_compiled_only_where_it_can_be():
    def compiled(hardware):
        made = plan(hardware, epochs=1000)
        return made.compile, reason(made, "compile")

    assert compiled(with_gpus(V100))[0]
    assert compiled(with_gpus(NEW_GPU))[0]
    old = compiled(with_gpus(GTX_1080))
    assert old == (False, "needs compute capability 7.0, and the GPU has 6.1")
    bare = dataclasses.replace(with_gpus(NEW_GPU), triton_fault="Triton is not installed")
    assert compiled(bare) == (False, "Triton is not installed")
    assert plan(bare, epochs=1000, compile=True).compile


def test_durations_become_steps():
    made = plan(
        batch_size=128,
        accumulate_grad_batches=4,
        epochs=10,
        warmup_epochs=1.5,
        scheduler="multi_step",
        milestones=(2.0, 4.5),
    )
    assert made.batches_per_epoch == 390
    assert made.steps_per_epoch == 98  # 97 groups of four and one of two
    assert made.total_steps == 980
    assert made.warmup_steps == 147
    assert made.milestones_steps == (196, 441)
    assert made.images_per_step == 512


def test_a_set_smaller_than_a_batch_is_one_batch():
    small = dataclasses.replace(FACTS, train_images=100)
    made = plan(facts=small, batch_size=128, epochs=2)
    assert (made.batches_per_epoch, made.total_steps) == (1, 2)


@pytest.mark.parametrize(
    ("interval", "steps_per_epoch", "expected"),
    [
        (0.5, 7, [4, 7, 11, 14]),
        (1.0, 7, [7, 14]),
        (2.0, 7, [14]),
        (3, 7, [3, 6, 9, 12, 14]),
        (0.1, 30, list(range(3, 61, 3))),
        (0.01, 7, list(range(1, 15))),
        (50, 7, [14]),
    ],
)
def test_evaluations_come_at_fractions_of_an_epoch_and_after_the_last_step(
    interval, steps_per_epoch, expected
):
    facts = dataclasses.replace(FACTS, train_images=steps_per_epoch * 10)
    made = plan(facts=facts, batch_size=10, epochs=2, val_check_interval=interval)
    found = [step for step in range(1, made.total_steps + 1) if made.evaluates_after(step)]
    assert found == expected


@pytest.mark.parametrize(
    ("stem", "image_size", "enlarged", "planned"),
    [
        ("auto", 32, 1, "cifar"),
        ("auto", 64, 1, "cifar"),
        ("auto", 224, 1, "imagenet"),
        ("auto", 32, 4, "imagenet"),
        ("cifar", 224, 1, "cifar"),
        ("imagenet", 32, 1, "imagenet"),
    ],
)
def test_stem_follows_the_image_size_unless_said(stem, image_size, enlarged, planned):
    facts = dataclasses.replace(FACTS, image_size=image_size, enlarged=enlarged)
    assert plan(facts=facts, stem=stem).stem == planned


def test_learning_rate_follows_the_images_of_a_step():
    assert plan(batch_size=64, lr=0.3).lr == 0.3
    doubled = plan(batch_size=64, accumulate_grad_batches=2).lr
    assert doubled == plan(batch_size=128).lr == 2 * plan(batch_size=64).lr
    assert plan(batch_size=256, optimizer="adamw").lr == 1e-3


def test_data_that_does_not_fit_is_not_resident():
    assert plan().resident_data
    large = dataclasses.replace(FACTS, array_bytes=5 * 2**30)
    assert not plan(facts=large).resident_data
    assert plan(with_gpus(NEW_GPU), facts=large).resident_data
    assert plan(facts=large, resident_data=True).resident_data
    assert not plan(resident_data=False).resident_data


def test_files_are_loaded_by_workers():
    files = dataclasses.replace(FACTS, storage="files", array_bytes=0)
    assert plan(facts=files).num_workers == 1
    assert plan(with_gpus(NEW_GPU), facts=files).num_workers == 8
    shared = plan(
        with_gpus(NEW_GPU, NEW_GPU), facts=files, world_size=2, local_world_size=2, batch_size=64
    )
    assert shared.num_workers == 4
    assert plan(facts=files, num_workers=3).num_workers == 3
    with pytest.raises(UserError, match="resident_data"):
        plan(facts=files, resident_data=True)


def test_compiling_waits_for_a_gpu_and_a_long_run():
    assert not plan(epochs=200).compile
    assert not plan(with_gpus(NEW_GPU), epochs=1).compile
    assert not plan(with_gpus(NEW_GPU), epochs=12, cuda_graph=False).compile
    made = plan(with_gpus(NEW_GPU), epochs=13, cuda_graph=False)
    assert made.compile
    assert made.compile_mode == "reduce-overhead"
    radeon = dataclasses.replace(NEW_GPU, architecture="gfx942")
    for hardware, processes in ((with_gpus(radeon), 1), (with_gpus(NEW_GPU, NEW_GPU), 2)):
        careful = plan(
            hardware, world_size=processes, local_world_size=processes, batch_size=64, epochs=200
        )
        assert careful.compile and careful.compile_mode == "default"
    assert reason(made, "compile") == "10,153 steps are enough to repay compiling (estimate)"
    recorded = dataclasses.replace(NEW_GPU, capability=(9, 0))
    assert not plan(with_gpus(recorded), epochs=13).compile
    made = plan(with_gpus(recorded), epochs=60)
    assert (made.cuda_graph, made.compile, made.compile_mode) == (True, True, "default")
    asked = plan(NATIVE_CPU, compile=True)
    assert asked.compile_mode == "default"
    assert reason(asked, "compile") == "asked for; mode default"
    assert reason(plan(compile=False), "compile") == "asked for"


def test_a_step_is_recorded_where_that_is_asked_for_and_possible():
    made = plan(with_gpus(NEW_GPU), epochs=200, cuda_graph=True)
    assert made.cuda_graph
    assert made.compile_mode == "default"
    for reason, hardware, settings in (
        ("only works on", CPU, {}),
        ("several batches", with_gpus(NEW_GPU), {"accumulate_grad_batches": 2}),
        ("fp16's scale", with_gpus(NEW_GPU), {"precision": "16-mixed"}),
        ("only fused", with_gpus(NEW_GPU), {"fused_optimizer": False}),
    ):
        made = plan(hardware, cuda_graph=True, **settings)
        assert not made.cuda_graph
        (choice,) = (choice for choice in made.choices if choice.name == "cuda_graph")
        assert reason in choice.reason


def test_several_processes_are_recorded_only_where_that_is_asked_for():
    def plan_two(gpu, **settings):
        processes = {"world_size": 2, "local_world_size": 2}
        return plan(with_gpus(gpu, gpu), **processes, batch_size=64, epochs=200, **settings)

    nvidia = dataclasses.replace(NEW_GPU, capability=(9, 0))
    by_itself = plan_two(nvidia)
    assert not by_itself.cuda_graph
    assert "not proven on a real GPU" in reason(by_itself, "cuda_graph")
    asked = plan_two(nvidia, cuda_graph=True)
    assert asked.cuda_graph and asked.compile_mode == "default"
    assert reason(asked, "cuda_graph") == "asked for"
    own_loader = dataclasses.replace(FACTS, storage="loader")
    for why, gpu, settings in (
        ("several batches", nvidia, {"accumulate_grad_batches": 2}),
        ("on ROCm", dataclasses.replace(NEW_GPU, architecture="gfx942"), {}),
        ("your own DataLoader", nvidia, {"facts": own_loader}),
    ):
        made = plan_two(gpu, cuda_graph=True, **settings)
        assert not made.cuda_graph
        assert why in reason(made, "cuda_graph")


def test_a_step_is_recorded_without_asking_where_that_works_and_pays():
    known = with_gpus(dataclasses.replace(NEW_GPU, capability=(9, 0)))
    made = plan(known)
    assert made.cuda_graph
    assert "cuda_graph" not in made.asked_for
    assert "(estimate)" in reason(made, "cuda_graph")
    on_cpu = plan()
    assert not on_cpu.cuda_graph
    assert "cuda_graph" not in [choice.name for choice in on_cpu.choices]
    assert not make_plan(TrainConfig(), known, FACTS, own_network="Net").cuda_graph
    for why, hardware, settings in (
        ("asked for", known, {"cuda_graph": False}),
        ("ROCm", with_gpus(NEW_GPU), {}),
        ("390 steps are too few", known, {"epochs": 1, "batch_size": 128}),
        ("records parts of the step itself", known, {"compile_mode": "reduce-overhead"}),
        ("several batches", known, {"accumulate_grad_batches": 2}),
    ):
        made = plan(hardware, **settings)
        assert not made.cuda_graph
        assert why in reason(made, "cuda_graph")


def test_weights_are_cast_together_where_that_is_asked_for_and_possible():
    gpu = with_gpus(NEW_GPU)
    assert not plan(gpu, epochs=1).master_weights
    assert plan(gpu, epochs=1, master_weights=True).master_weights
    for why, settings in (
        ("precision 32", {"precision": "32"}),
        ("torch.compile casts", {"compile": True}),
        ("recomputed activations", {"activation_checkpointing": True, "compile": False}),
    ):
        made = plan(gpu, master_weights=True, **settings)
        assert not made.master_weights
        assert why in reason(made, "master_weights")


def test_an_evaluation_on_a_gpu_has_the_largest_batch_that_is_useful_and_fits():
    assert plan(batch_size=16).evaluation_batch_size == 64
    assert plan(with_gpus(NEW_GPU), batch_size=16).evaluation_batch_size == 1024
    assert plan(with_gpus(NEW_GPU), batch_size=2048).evaluation_batch_size == 2048
    small = dataclasses.replace(NEW_GPU, memory_bytes=8 * 2**30)
    made = plan(with_gpus(small))  # 1 GiB, of 4 MiB an image
    assert made.evaluation_batch_size == 256
    assert "(estimate)" in reason(made, "evaluation batch")
    assert plan(with_gpus(small), num_workers=2, resident_data=False).evaluation_batch_size == 64
    two = plan(with_gpus(small, small), world_size=2, local_world_size=2, batch_size=64)
    assert two.evaluation_batch_size == 512
    few = dataclasses.replace(FACTS, val_images=100)
    assert plan(with_gpus(NEW_GPU), few, batch_size=16).evaluation_batch_size == 64


def test_processes_share_batch_and_threads():
    made = plan(world_size=4, local_world_size=2, batch_size=64)
    assert (made.device_batch_size, made.threads) == (16, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 2}, "torchrun --nproc-per-node=2"),
        ({"strategy": "ddp"}, "ddp is for several processes, and one is started; start it with"),
        ({"devices": 2, "world_size": 4, "local_world_size": 4}, "devices is 2 but torchrun"),
        ({"world_size": 3, "local_world_size": 3, "batch_size": 64}, "multiple of 3"),
        ({"num_classes": 5}, "num_classes is 5 but cifar10 has 10"),
        ({"accelerator": "gpu"}, "finds no GPU"),
        (
            {"hardware": with_gpus(NEW_GPU), "world_size": 2, "local_world_size": 2},
            "1 usable GPU",
        ),
    ],
)
def test_what_cannot_be_done_here_is_an_error_with_the_cure(arguments, message):
    with pytest.raises(UserError, match=message):
        plan(**arguments)


def test_pinned_memory_is_for_cuda_loaders():
    files = dataclasses.replace(FACTS, storage="files", array_bytes=0)
    assert plan(with_gpus(NEW_GPU), facts=files).pin_memory
    assert not plan(with_gpus(NEW_GPU)).pin_memory
    assert not plan(facts=files, pin_memory=True).pin_memory


def test_a_users_loader_is_not_augmented():
    facts = dataclasses.replace(FACTS, storage="loader")
    made = plan(facts=facts, batches=7, flip="random", crop_padding=4)
    assert (made.flip, made.crop_padding, made.batches_per_epoch) == ("none", 0, 7)


def test_images_that_are_made_on_the_device_stay_there():
    made_up = dataclasses.replace(FACTS, storage="generated", array_bytes=10**15)
    for settings in ({}, {"resident_data": False, "num_workers": 2}):
        made = plan(facts=made_up, **settings)
        assert (made.resident_data, made.num_workers) == (True, 0)
        assert "made on the device" in reason(made, "resident_data")


def test_a_users_loader_loads_as_it_likes():
    facts = dataclasses.replace(FACTS, storage="loader", array_bytes=0)
    left = plan(with_gpus(NEW_GPU), facts=facts, batches=7)
    assert (left.resident_data, left.num_workers, left.pin_memory) == (False, 0, False)
    wanted = {"resident_data": True, "num_workers": 3, "pin_memory": True}
    asked = plan(with_gpus(NEW_GPU), facts=facts, batches=7, **wanted)
    assert (asked.resident_data, asked.num_workers, asked.pin_memory) == (False, 0, False)
    assert {reason(asked, key) for key in wanted} == {"your own loader decides how it loads"}


def test_fused_sgd_is_left_alone_where_gradient_scaling_skips_steps():
    assert plan().fused_optimizer
    assert not plan(precision="16-mixed").fused_optimizer
    assert plan(precision="16-mixed", optimizer="adamw").fused_optimizer
    assert plan(precision="16-mixed", fused_optimizer=True).fused_optimizer


def test_kernels_are_compiled_where_they_are_measured_to_pay():
    made = plan(NATIVE_CPU)
    assert made.winograd_convolutions and made.fused_norms and made.keep_memory
    for hardware in (
        dataclasses.replace(NATIVE_CPU, instruction_sets=("avx2",)),
        dataclasses.replace(NATIVE_CPU, cpp_compiler=None),
        dataclasses.replace(NATIVE_CPU, accelerators=(NEW_GPU,)),
    ):
        made = plan(hardware)
        assert not made.winograd_convolutions and not made.fused_norms
    for settings in ({"precision": "bf16-mixed"}, {"channels_last": False}, {"compile": True}):
        made = plan(NATIVE_CPU, **settings)
        assert not made.winograd_convolutions and not made.fused_norms
    without = plan(dataclasses.replace(NATIVE_CPU, cpp_compiler=None))
    assert "no C++ compiler is installed" in reason(without, "fused_norms")


@pytest.mark.parametrize(
    ("key", "hardware", "settings"),
    [
        ("winograd_convolutions", with_gpus(NEW_GPU), {}),
        ("winograd_convolutions", NATIVE_CPU, {"precision": "bf16-mixed"}),
        ("fused_norms", CPU, {"precision": "16-mixed"}),
        ("small_map_convolutions", with_gpus(NEW_GPU), {}),
        ("keep_memory", CPU, {}),
    ],
)
def test_what_is_asked_for_where_it_does_nothing_is_off(key, hardware, settings):
    made = plan(hardware, **{key: True}, **settings)
    assert made.switch_values()[key] is False
    assert re.search("only works on|only glibc", reason(made, key))


@pytest.mark.parametrize("key", ["winograd_convolutions", "fused_norms", "compile"])
def test_what_needs_a_compiler_is_refused_without_one(key):
    bare = dataclasses.replace(NATIVE_CPU, cpp_compiler=None)
    assert plan(NATIVE_CPU, precision="32", **{key: True}).switch_values()[key] is True
    with pytest.raises(UserError, match=rf"^{key}: no C\+\+ compiler .*, or set {key} to false$"):
        plan(bare, precision="32", **{key: True})


def test_a_set_smaller_than_a_batch_counts_as_it_is():
    small = dataclasses.replace(FACTS, train_images=20)
    plan = make_plan(TrainConfig(batch_size=64), CPU, small)
    assert (plan.global_batch_size, plan.images_per_step) == (20, 20)
    assert plan.lr == pytest.approx(0.1 * 20 / 64)


@pytest.mark.parametrize(
    ("epochs", "total", "last_group"),
    # 5 batches an epoch in groups of 2: whole epochs have 3 steps.
    [(2, 6, 1), (1.6, 5, 1), (1.8, 5, 2), (0.4, 1, 2), (0.01, 1, 1)],
)
def test_a_run_may_end_within_an_epoch(epochs, total, last_group):
    facts = dataclasses.replace(FACTS, train_images=50)
    made = plan(facts=facts, epochs=epochs, batch_size=10, accumulate_grad_batches=2)
    assert made.total_steps == total
    groups, epoch, batch = [], 0, 0
    while epoch * 5 + batch < made.total_batches:
        groups.append(made.group_size(epoch, batch))
        batch += groups[-1]
        if batch == 5:
            epoch, batch = epoch + 1, 0
    assert (len(groups), groups[-1]) == (total, last_group)
    assert sum(groups) == made.total_batches


def test_whole_epochs_stay_whole_numbers():
    assert plan(epochs=3.0).epochs == 3 and isinstance(plan(epochs=3.0).epochs, int)
