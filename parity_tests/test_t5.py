"""The T5 / mT5 encoder: golden numbers on both backends, parity of every module and gradient, buckets, half types."""

import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

import golden_files
import osp_mindspore  # noqa: F401  sets MindSpore up
from osp_mindspore import checkpoint as ms_checkpoint
from osp_mindspore import t5 as ms_t5
from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.geometry.relative import bucket, bucket_table
from osp_shared.specs.t5 import ALIAS, RELEASED, T5Spec
from osp_torch import checkpoint as torch_checkpoint
from osp_torch import t5 as torch_t5

import mindspore as ms

ENCODERS = golden_files.items("text", "encoders", lambda e: e["name"])
TINY = {
    "vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def build(backend, spec, salt="", dtype="fp32"):
    shapes = spec.parameters()
    checkpoint, module = {
        "torch": (torch_checkpoint, torch_t5), "mindspore": (ms_checkpoint, ms_t5)
    }[backend]
    return checkpoint.build(
        module.T5Encoder, spec, lambda name: fill.parameter(name, shapes[name], salt), dtype, module.KEEP_FLOAT32
    )


def run(backend, model, ids, mask):
    """Last hidden state and the output of every module, float64, by module path."""
    found = {}

    def keep(path, value):
        value = value[0] if isinstance(value, tuple) else getattr(value, "last_hidden_state", value)
        if backend == "torch":
            found[path] = value.detach().double().numpy()
        else:
            found[path] = value.astype(ms.float32).asnumpy().astype(np.float64)

    if backend == "torch":
        hooks = [
            m.register_forward_hook(lambda _m, _i, out, path=path: keep(path, out))
            for path, m in model.named_modules() if path
        ]
        with torch.no_grad():
            out = model(torch.from_numpy(ids), torch.from_numpy(mask))
        keep("", out)
    else:
        hooks = [
            m.register_forward_hook(lambda _m, _i, out, path=path: keep(path, out))
            for path, m in model.cells_and_names() if path
        ]
        keep("", model(ms.Tensor(ids.astype(np.int32)), ms.Tensor(mask.astype(np.int32))))
    for hook in hooks:
        hook.remove()
    return found


def inputs(lengths, width, vocab):
    ids = fill.rng("t5 ids").integers(2, vocab, (len(lengths), width))
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return ids * mask, mask


def check_record(record, value):
    """Golden record [name, shape, mean, std, l2, samples]: l2 to 1e-5 relative, samples to 1e-4: the files' gates."""
    name, shape, mean, std, l2, samples = record
    value = value.reshape(shape)
    np.testing.assert_allclose(np.linalg.norm(value), l2, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose([value.mean(), value.std()], [mean, std], atol=1e-5 * std, rtol=1e-5, err_msg=name)
    index = [int(np.floor((j + 1) * 0.6180339887498949 % 1.0 * value.size)) for j in range(len(samples))]
    np.testing.assert_allclose(value.ravel()[index], samples, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
@pytest.mark.parametrize(("file", "case"), ENCODERS)
def test_golden(backend, file, case):
    spec = T5Spec.from_config(case["config"])
    assert {k: list(v) for k, v in spec.parameters().items()} == case["keys"]
    ids = np.array(case["input_ids"])
    mask = (np.arange(ids.shape[1]) < np.array(case["valid"])[:, None]).astype(np.int64)
    found = run(backend, build(backend, spec, file["header"].get("salt", "")), ids, mask)
    for record in case["records"]:
        check_record(record, found[record[0]])
    check_record(case["output"], found[""])


@pytest.mark.parametrize(("file", "case"), ENCODERS)
def test_golden_buckets(file, case):
    config = case["config"]
    sizes = config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
    relative, expected = case["bucket_of"]
    assert bucket(np.array(relative), *sizes).tolist() == expected
    assert bucket_table(len(case["bucket_row0"]), *sizes)[0].tolist() == case["bucket_row0"]


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (64, 512), (8, 20)])
def test_buckets_equal_the_library_everywhere(buckets, distance):
    relative = np.arange(-700, 701)
    library = T5Attention._relative_position_bucket(torch.from_numpy(relative), True, buckets, distance)
    assert bucket(relative, buckets, distance).tolist() == library.tolist()


def test_parity_of_every_module():
    """Both float32 backends against torch in float64: MindSpore may err 4 times as much as torch itself, over a floor
    of one rounding for each of the sqrt(reduction) terms of the widest sum."""
    spec = T5Spec.from_config(TINY)
    ids, mask = inputs([9, 20, 1], 20, spec.vocab_size)
    truth = run("torch", build("torch", spec, dtype="fp64"), ids, mask)
    reference = run("torch", build("torch", spec), ids, mask)
    candidate = run("mindspore", build("mindspore", spec), ids, mask)
    shared = [p for p in candidate if p in truth]
    assert len(shared) > 40 and "encoder.block.2.layer.1.DenseReluDense.wo" in shared
    for path in shared:
        scale = np.sqrt(np.mean(truth[path] ** 2))
        own = np.sqrt(np.mean((reference[path] - truth[path]) ** 2))
        error = np.sqrt(np.mean((candidate[path] - truth[path]) ** 2))
        floor = 2.0**-24 * np.sqrt(spec.d_ff) * scale
        assert error <= 4 * own + floor, f"{path}: error {error:.3g}, torch's own {own:.3g}, floor {floor:.3g}"


def test_gradient_parity():
    """Gradient of a weighted sum with respect to every parameter, judged as above by the relative L2 norm."""
    spec = T5Spec.from_config(TINY)
    ids, mask = inputs([9, 12], 12, spec.vocab_size)
    weight = fill.input_tensor("gradw", (2, 12, spec.d_model))

    def torch_gradients(dtype):
        model = build("torch", spec, dtype=dtype)
        out = model(torch.from_numpy(ids), torch.from_numpy(mask))
        (out * torch.from_numpy(weight).to(out.dtype)).mean().backward()
        return {n: p.grad.double().numpy() for n, p in model.named_parameters()}

    model = build("mindspore", spec)
    ids_ms, mask_ms, weight_ms = ms.Tensor(ids.astype(np.int32)), ms.Tensor(mask.astype(np.int32)), ms.Tensor(weight)

    def loss():
        return (model(ids_ms, mask_ms) * weight_ms).mean()

    parameters = list(model.trainable_params())
    gradients = ms.grad(loss, None, parameters)()
    truth, reference = torch_gradients("fp64"), torch_gradients("fp32")
    assert {p.name for p in parameters} == set(truth) == set(spec.parameters())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        exact, g = truth[parameter.name], gradient.asnumpy().astype(np.float64)
        own, error = np.linalg.norm(reference[parameter.name] - exact), np.linalg.norm(g - exact)
        floor = 2.0**-24 * np.sqrt(spec.d_ff) * np.linalg.norm(exact)
        assert error <= 4 * own + floor, f"{parameter.name}: {error:.3g}, torch's own {own:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_types_stay_within_their_rounding(dtype):
    """Rounding after each product, 3 blocks: within 4 times the library's own error in that type."""
    spec = T5Spec.from_config(TINY)
    ids, mask = inputs([9, 12], 12, spec.vocab_size)
    exact = run("torch", build("torch", spec, dtype="fp64"), ids, mask)[""]
    own = np.linalg.norm(run("torch", build("torch", spec, dtype=dtype), ids, mask)[""] - exact)
    model = build("mindspore", spec, dtype=dtype)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert wo.dtype == (ms.float32 if dtype == "fp16" else ms.bfloat16)
    assert np.linalg.norm(run("mindspore", model, ids, mask)[""] - exact) <= 4 * own


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_masked_tokens_do_not_matter(backend):
    spec = T5Spec.from_config(TINY)
    ids, mask = inputs([7], 12, spec.vocab_size)
    other = np.where(mask == 1, ids, 3)
    model = build(backend, spec)
    a, b = (run(backend, model, i, mask)[""][:, :7] for i in (ids, other))
    assert np.array_equal(a, b)


def test_released_size_and_models_have_exactly_the_spec_names():
    D, F = 4096, 10240
    block = 4 * D * D + 3 * D * F + 2 * D
    assert RELEASED.parameter_count == 250112 * D + 24 * block + 32 * 64 + D
    spec = T5Spec.from_config(TINY)
    names = set(spec.parameters())
    assert set(torch_t5.T5Encoder(spec).state_dict()) == names == set(ms_t5.T5Encoder(spec).parameters_dict())


def test_topology_comes_from_the_keys():
    spec = T5Spec.from_config(TINY)
    shapes = spec.parameters() | {ALIAS: spec.parameters()["shared.weight"], "decoder.final_layer_norm.weight": (24,)}
    derived = T5Spec.derive(shapes)
    assert derived.parameters() == spec.parameters()
    derived.check(shapes)
    with pytest.raises(OspError, match="num_heads 2, the weights 4.*relative_attention_bias"):
        T5Spec.derive(shapes, TINY | {"num_heads": 2})
    with pytest.raises(OspError, match="not the weights of a gated T5"):
        T5Spec.derive({"a": (1,)})
    with pytest.raises(OspError, match="1 missing: shared.weight"):
        spec.check({k: v for k, v in shapes.items() if k != "shared.weight"})
    with pytest.raises(OspError, match="feed_forward_proj"):
        T5Spec.from_config(TINY | {"feed_forward_proj": "relu"})
