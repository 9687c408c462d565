"""The product sphere and class tokens in the real OpenCLIP: models, checkpoints, and its trainer in this process."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, openclip_flags, run_python, write_model

pytest.importorskip("open_clip_train", reason="needs the extra: pip install 'mmts-plugins[openclip]'")

import open_clip
from open_clip_train.main import main

from mmts_plugins.adapters.openclip_geometry import EXTRA, MARKER, TEXT_TOKENS, Geometry, convert, geometry_of, marked
from mmts_plugins.errors import ConfigError, MMTSError, SeamError
from mmts_plugins.geometry import product_geodesic, product_normalize

N, M, WIDTH = 8, 8, 32
SPHERE = ("--mmts-product-sphere", f"{N},{M}")
MULTI = (*SPHERE, "--mmts-class-tokens")
TEXT = {"context_length": 12, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2}
VISION = {"image_size": 16, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 8}
CONFIG: dict[str, Any] = {"embed_dim": N * M, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture(scope="session")
def model_of_64(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("sphere"), **CONFIG)


def make(custom_text: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy({**CONFIG, **changes})
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return kind(**config, output_dict=True).eval()


def converted(tokens: bool, custom_text: bool = False, distance: str = "inner", **changes: Any) -> Any:
    model = make(custom_text, **changes)
    convert(model, Geometry(N, M, distance, tokens) if distance != "euclidean" else Geometry(None, 1, distance))
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, 16, 16), open_clip.tokenize(CAPTIONS, 12)


both = pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
tokens_or_not = pytest.mark.parametrize("tokens", [False, True], ids=["PS", "Multi"])


# -- models -----------------------------------------------------------------------------------------------------------


@both
def test_the_sphere_alone_normalises_what_the_model_gives_to_the_bit(custom_text, batch):
    plain, sphere = make(custom_text), converted(False, custom_text)
    assert set(sphere.state_dict()) - set(plain.state_dict()) == {MARKER}
    assert all(torch.equal(value, sphere.state_dict()[name]) for name, value in plain.state_dict().items())
    with torch.no_grad():
        for name, given in zip(("encode_image", "encode_text"), batch):
            expected = product_normalize(getattr(plain, name)(given), M)
            for normalize in (False, True):
                assert torch.equal(getattr(sphere, name)(given, normalize=normalize), expected)
            again = F.normalize(expected, dim=-1)
            assert float((again - expected).abs().max()) <= 1e-7
        output = sphere(*batch)
        assert torch.equal(output["image_features"], sphere.encode_image(batch[0]))
        assert torch.equal(output["text_features"], sphere.encode_text(batch[1]))


def test_one_sphere_changes_nothing(batch):
    plain, sphere = make(), make()
    convert(sphere, Geometry(N * M, 1))
    with torch.no_grad():
        for one, other in zip(plain(*batch).values(), sphere(*batch).values()):
            assert torch.equal(one, other)


@both
def test_only_the_named_weights_differ_and_their_number_is_known(custom_text):
    plain, multi = make(custom_text).state_dict(), converted(True, custom_text).state_dict()
    text = "text." if custom_text else ""
    different = {name for name in multi if name not in plain or not torch.equal(multi[name], plain[name])}
    new = {MARKER, f"visual.{EXTRA}", f"{text}{TEXT_TOKENS}"}
    assert different == new | {"visual.proj", f"{text}text_projection"}
    assert set(plain) <= set(multi)
    count = sum(multi[name].numel() for name in multi if name != MARKER) - sum(map(torch.numel, plain.values()))
    assert count == -(WIDTH + WIDTH) * (N * M - N) + (M - 1) * WIDTH + M * WIDTH


def test_conversion_leaves_the_generator_as_it_was():
    states = []
    for tokens in (None, False, True):
        model = make()
        if tokens is not None:
            convert(model, Geometry(N, M, class_tokens=tokens))
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("changes", [{}, {"final_ln_after_pool": True}, {"no_ln_pre": True}], ids=str)
def test_vision_equals_a_forward_written_out(changes, batch):
    model = converted(True, vision_cfg={**VISION, **changes})
    tower, images = model.visual, batch[0]
    with torch.no_grad():
        patches = tower.conv1(images).flatten(2).transpose(1, 2)
        first = tower.class_embedding.expand(6, 1, -1) + tower.positional_embedding[0]
        extra = getattr(tower, EXTRA).view(1, M - 1, WIDTH).expand(6, -1, -1) + tower.positional_embedding[0]
        x = torch.cat([first, extra, patches + tower.positional_embedding[1:]], 1)
        x = tower.transformer(tower.ln_pre(x))[:, :M]
        expected = F.normalize(tower.ln_post(x) @ tower.proj, dim=-1).flatten(1) / M**0.5
        assert torch.equal(model.encode_image(images), expected)


@both
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("pool", ["argmax", "eos", "last"])
def test_text_equals_tokens_appended_behind_a_padding_mask(custom_text, causal, pool, batch):
    cfg = {**TEXT, "pool_type": pool, "eos_id": 49407, "no_causal_mask": not causal}
    model, text = converted(True, custom_text, text_cfg=cfg), batch[1]
    tower = model.text if custom_text else model
    length = text.shape[1]
    with torch.no_grad():
        x = tower.token_embedding(text) + tower.positional_embedding
        x = torch.cat([x, getattr(tower, TEXT_TOKENS).view(1, M, WIDTH).expand(6, -1, -1)], 1)
        mask = torch.zeros(6, length + M, length + M)
        if causal:
            mask += torch.full((length + M, length + M), -torch.inf).triu(1)
            if pool != "last":  # the class tokens do not see the padding
                padding = torch.arange(length) > text.argmax(1)[:, None]
                mask[:, length:, :length].masked_fill_(padding[:, None], -torch.inf)
        x = tower.transformer(x, attn_mask=mask.repeat_interleave(TEXT["heads"], 0))[:, length:]
        expected = F.normalize(tower.ln_final(x) @ tower.text_projection, dim=-1).flatten(1) / M**0.5
        torch.testing.assert_close(model.encode_text(text), expected, rtol=0, atol=1e-6)


def test_what_stands_in_the_padding_has_no_effect(batch):
    model, text = converted(True), batch[1].clone()
    with torch.no_grad():
        before = model.encode_text(text)
        padding = torch.arange(text.shape[1]) > text.argmax(1)[:, None]
        text[padding] = 1234
        assert padding.any(1).all()
        assert torch.equal(model.encode_text(text), before)


@both
def test_every_weight_gets_a_gradient_and_tokens_differ(custom_text, batch):
    model = converted(True, custom_text).train()
    output = model(*batch)
    open_clip.ClipLoss()(**output).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    for name in ("image_features", "text_features"):
        parts = M**0.5 * output[name].detach().unflatten(-1, (M, N))
        alike = (parts @ parts.transpose(1, 2))[:, ~torch.eye(M, dtype=torch.bool)]
        assert -0.5 < float(alike.mean()) < 0.9, name


@both
@tokens_or_not
def test_intermediates_and_logits(custom_text, tokens, batch):
    plain, model = make(custom_text), converted(tokens, custom_text)
    with torch.no_grad():
        features = [model.encode_image(batch[0]), model.encode_text(batch[1])]
        given = {"image": batch[0], "text": batch[1], "image_output_extra_tokens": True}
        found, before = (each.forward_intermediates(**given) for each in (model, plain))
        torch.testing.assert_close(found["image_features"], features[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(found["text_features"], features[1], rtol=0, atol=1e-6)
        for name in ("image_intermediates", "text_intermediates"):
            assert [each.shape for each in found[name]] == [each.shape for each in before[name]]
        assert found["image_intermediates_prefix"][0].shape == (6, M if tokens else 1, WIDTH)
        for name, other in (("image_intermediates", "NLC"), ("image_intermediates", "NCHW")):
            again = model.forward_intermediates(image=batch[0], image_output_fmt=other)[name]
            assert [tuple(each.shape) for each in again] == [(6, 4, WIDTH) if other == "NLC" else (6, WIDTH, 2, 2)] * 2
        expected = model.logit_scale.exp() * features[0] @ features[1].T
        torch.testing.assert_close(model.get_logits(*batch)[0], expected)
        asked = model.forward_intermediates(*batch, output_logits=True)
        torch.testing.assert_close(asked["image_logits"], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(asked["text_logits"], expected.T, rtol=1e-5, atol=1e-5)


def test_the_logits_of_other_distances(batch):
    model = converted(False, distance="geodesic")
    plain = converted(False, distance="euclidean")
    with torch.no_grad():
        features = model.encode_image(batch[0]), model.encode_text(batch[1])
        expected = -model.logit_scale.exp() * product_geodesic(*features, M)
        torch.testing.assert_close(model.get_logits(*batch)[0], expected)
        images, texts = make().encode_image(batch[0]), make().encode_text(batch[1])
        assert torch.equal(plain.encode_image(batch[0], normalize=True), images)
        expected = -plain.logit_scale.exp() * (images[:, None] - texts).norm(dim=-1)
        torch.testing.assert_close(plain.get_logits(*batch)[0], expected)


@both
@tokens_or_not
def test_copies_compiles_and_checkpoints(custom_text, tokens, batch):
    model = converted(tokens, custom_text)
    with torch.no_grad():
        expected = model(*batch)["image_features"]
        assert torch.equal(copy.deepcopy(model)(*batch)["image_features"], expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*batch)["image_features"], expected)
    gradients = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train()
        copied.set_grad_checkpointing(checkpointing)
        open_clip.ClipLoss()(**copied(*batch)).backward()
        gradients.append([weight.grad for weight in copied.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@both
def test_towers_lock_with_their_tokens(custom_text):
    model = converted(True, custom_text)
    text = model.text if custom_text else model
    groups = VISION["layers"] + 2
    for unlocked in (0, 1, groups):
        model.lock_image_tower(unlocked_groups=unlocked)
        assert getattr(model.visual, EXTRA).requires_grad is (unlocked == groups), unlocked
        assert model.visual.proj.requires_grad is (unlocked > 0)
    model.lock_text_tower()
    assert not getattr(text, TEXT_TOKENS).requires_grad
    if hasattr(model.visual, "layer_groups"):
        members = [each for _, group in model.visual.layer_groups() for each in group]
        weights = {id(w) for each in members for w in ([each] if isinstance(each, torch.Tensor) else each.parameters())}
        assert {id(weight) for weight in model.visual.parameters()} <= weights


def test_tokens_are_spared_weight_decay():
    model = converted(True)
    assert f"visual.{EXTRA}" in model.no_weight_decay()
    assert {getattr(model.visual, EXTRA).ndim, getattr(model, TEXT_TOKENS).ndim} == {1}


REFUSED = {
    "width": ({}, Geometry(8, 4), "8 * 4 must be the model's embed_dim, which is 64"),
    "resnet": (
        {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
        Geometry(8, 8, class_tokens=True),
        "here they are ModifiedResNet and CLIP",
    ),
    "average": ({"vision_cfg": {**VISION, "pool_type": "avg"}}, Geometry(8, 8, class_tokens=True), "pools its class"),
    "pooler": (
        {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}},
        Geometry(8, 8, class_tokens=True),
        "pools its class token",
    ),
    "timm": (
        {"vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 32}},
        Geometry(8, 8, class_tokens=True),
        "here they are TimmModel and CLIP",
    ),
    "projection": ({"text_cfg": {**TEXT, "proj_bias": True}}, Geometry(8, 8, class_tokens=True), "linear projection"),
}


@pytest.mark.parametrize(("changes", "geometry", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_have_it(changes, geometry, message, batch):
    model = make(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        convert(model, geometry)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert geometry_of(model) is None
    assert model.state_dict().keys() == before.keys(), "half converted"
    if geometry.class_tokens:  # the sphere alone takes any model
        convert(model, Geometry(8, 8))
        size = changes.get("vision_cfg", VISION)["image_size"]
        with torch.no_grad():
            features = model.encode_image(torch.randn(2, 3, size, size))
        lengths = features.unflatten(-1, (8, 8)).norm(dim=-1)
        torch.testing.assert_close(lengths, torch.full((2, 8), 8**-0.5))


# -- the trainer ------------------------------------------------------------------------------------------------------


def flags(model: str, data: Any, logs: Path, *ours: str, **changes: Any) -> list[str]:
    return [*openclip_flags(model, logs, train_data=data.csv, dataset_type="csv", **changes), *ours]


def weights(logs: Path, name: str = "run", epoch: int = 2) -> dict[str, torch.Tensor]:
    path = logs / name / "checkpoints" / f"epoch_{epoch}.pt"
    return torch.load(path, weights_only=True)["state_dict"]


def scales(logs: Path, name: str = "run") -> list[str]:
    found = re.findall(r"Logit Scale: ([\d.]+)", (logs / name / "out.log").read_text())
    assert len(found) == 12
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fixed_scale_of_one_is_m_in_the_hosts_units(model_of_64, data, tmp_path, caplog):
    with caplog.at_level("INFO"):
        main(flags(model_of_64, data, tmp_path, *SPHERE, "--mmts-logit-scale", "1", "--mmts-fixed-logit-scale"))
    assert set(scales(tmp_path)) == {"8.000"}
    assert "MM-TS: features on PS(8, 8); logit scale starts at 8 (t = 1), is fixed" in caplog.text
    saved = weights(tmp_path)
    assert saved["logit_scale"].item() == pytest.approx(math.log(8), abs=1e-7)
    assert saved[MARKER].tolist() == [8, 8, 0]
    assert "mmts_product_sphere: 8,8" in (tmp_path / "run/params.txt").read_text()


def test_the_clamp_is_where_the_flag_puts_it(model_of_64, data, tmp_path):
    """Below where the scale would go, and above OpenCLIP's own."""
    main(flags(model_of_64, data, tmp_path / "a", "--mmts-logit-scale", "150", "--mmts-max-logit-scale", "200"))
    assert 101 < float(scales(tmp_path / "a")[-1]) <= 200
    ours = ("--mmts-logit-scale", "1.8", "--mmts-max-logit-scale", "1.8")
    main(flags(model_of_64, data, tmp_path / "b", *SPHERE, *ours, lr=0.3))
    found = [float(scale) for scale in scales(tmp_path / "b")]
    assert max(found) <= 14.4001
    assert weights(tmp_path / "b")["logit_scale"].exp().item() <= 14.4001
    assert MARKER not in weights(tmp_path / "a")


@tokens_or_not
def test_mm_ts_on_the_sphere_is_exact(tokens, model_of_64, data, tmp_path, monkeypatch):
    import reference

    from mmts_plugins.adapters.openclip import ScheduledLoss

    calls, forward = [], ScheduledLoss.forward

    def recording(loss, image_features, text_features, logit_scale, **kwargs):
        out = forward(loss, image_features, text_features, logit_scale, **kwargs)
        tau = loss.temperature if kwargs.get("mmts_temperature") is None else kwargs["mmts_temperature"]
        given = [each.detach().double() for each in (image_features, text_features, tau)]
        calls.append((*given, float(out["contrastive_loss"].detach())))
        return out

    monkeypatch.setattr(ScheduledLoss, "forward", recording)
    ours = MULTI if tokens else SPHERE
    main(flags(model_of_64, data, tmp_path, *ours, "--loss", "mmts", "--mmts-clusters", str(data.table)))
    assert len(calls) == 12
    for images, texts, tau, loss in calls:
        # the paper's sum of cosines, at a temperature m times as high
        u, v = (M**0.5 * each.unflatten(-1, (M, N)) for each in (images, texts))
        torch.testing.assert_close(u.norm(dim=-1), torch.ones(8, M, dtype=torch.float64), rtol=0, atol=1e-6)
        alike = torch.einsum("inm,jnm->ij", u, v) / (M * tau[:, None])
        across = torch.einsum("inm,jnm->ij", v, u) / (M * tau[:, None])
        own = torch.arange(8)
        assert loss == pytest.approx(float((F.cross_entropy(alike, own) + F.cross_entropy(across, own)) / 2), abs=2e-6)
        assert loss == pytest.approx(float(reference.info_nce(images, texts, tau)), abs=2e-6)
    record = (tmp_path / "run/mmts.yaml").read_text()
    assert "product_sphere: 8,8" in record


OPTIONS = {
    "plain": {},
    "accumulated": {"accum_freq": 2},
    "bfloat16": {"precision": "amp_bf16"},
    "grad-checkpointing": {"grad_checkpointing": True},
    "compiled": {"torchcompile": True},
    "lock-image": {"lock_image": True, "lock_image_unlocked_groups": 2},
    "lock-text": {"lock_text": True, "lock_text_freeze_layer_norm": True},
    "image-size": {"force_image_size": 24},
    "timm-optimizer": {"opt": "timm/adamw", "eps": 1e-8},
    "siglip": {"siglip": True},
    "custom-text": {"force_custom_text": True},
}


@pytest.fixture
def epochs_of_their_own(monkeypatch):
    """OpenCLIP draws the order of a CSV file's samples anew where it resumes: here each epoch has its own."""
    module = sys.modules["open_clip_train.main"]
    train = module.train_one_epoch
    seen = []

    def seeded(*given, **options):
        epoch = given[0].epoch if hasattr(given[0], "epoch") else given[3]
        seen.append(epoch)
        torch.manual_seed(1000 + epoch)
        return train(*given, **options)

    monkeypatch.setattr(module, "train_one_epoch", seeded)
    return seen


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumed_equals_uninterrupted(options, model_of_64, data, tmp_path, epochs_of_their_own, request, monkeypatch):
    """Without a flag of ours: the checkpoint says what it is.

    On one thread: compiled for several, OpenCLIP without us does not equal itself (gradients of embeddings are added in
    any order). Compiled as far as graphs: machine code, which takes most of a minute, is another test's.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    given = {"save_frequency": 1, "lr_scheduler": "const", "warmup": 0, **options}
    main(flags(model_of_64, data, tmp_path, *MULTI, name="whole", **given))
    main(flags(model_of_64, data, tmp_path, *MULTI, name="half", **given, epochs=1))
    resumed = flags(model_of_64, data, tmp_path, name="rest", **given)
    main([*resumed, "--resume", str(tmp_path / "half/checkpoints/epoch_1.pt")])
    assert epochs_of_their_own == [0, 1, 0, 1]
    assert equal(weights(tmp_path, "whole"), weights(tmp_path, "rest"))
    assert not equal(weights(tmp_path, "whole", 1), weights(tmp_path, "whole")), "nothing was trained"
    assert marked(weights(tmp_path, "rest")) == Geometry(N, M, class_tokens=True)


def test_accumulation_and_checkpointing_train_as_plain_does(model_of_64, data, tmp_path):
    # With a fixed scale: OpenCLIP's accumulation takes its gradient once for every part of a batch.
    ours = (*MULTI, "--mmts-fixed-logit-scale")
    given = {"lr_scheduler": "const", "warmup": 0, "epochs": 1, "lr": 0.1, "opt": "timm/sgd", "momentum": 0.9}
    for name, options in (
        ("full", {"batch_size": 16}),
        ("accumulated", {"batch_size": 8, "accum_freq": 2}),
        ("checkpointed", {"batch_size": 16, "grad_checkpointing": True}),
        ("compiled", {"batch_size": 16, "torchcompile": True}),
    ):
        main(flags(model_of_64, data, tmp_path, *ours, name=name, **{**given, **options}))
    full = weights(tmp_path, "full", 1)
    for name in ("accumulated", "checkpointed", "compiled"):
        for key, value in weights(tmp_path, name, 1).items():
            torch.testing.assert_close(value, full[key], rtol=0, atol=5e-5, msg=f"{name}: {key}")


def test_other_distances_train(model_of_64, data, tmp_path):
    geodesic = (*SPHERE, "--mmts-distance", "geodesic")
    main(flags(model_of_64, data, tmp_path, *geodesic, name="geodesic"))
    logged = re.findall(r"Contrastive_loss: ([\d.]+)", (tmp_path / "geodesic/out.log").read_text())
    assert len(logged) >= 12
    assert weights(tmp_path, "geodesic")[MARKER].tolist() == [8, 8, 1]
    main(flags(model_of_64, data, tmp_path, "--mmts-distance", "euclidean", name="euclidean"))
    assert weights(tmp_path, "euclidean")[MARKER].tolist() == [64, 1, 2]


TOWERS = {
    "coca": {
        "multimodal_cfg": {**TEXT, "width": N * M, "mlp_ratio": 2},
        "text_cfg": {**TEXT, "width": N * M, "embed_cls": True, "output_tokens": True},
        "vision_cfg": {**VISION, "output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
    "timm": {
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "avg",
                       "image_size": 32},
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), TOWERS.items(), ids=TOWERS)
def test_other_towers_train_on_the_sphere_alone(name, changes, data, batch, tmp_path):
    import mmts_plugins

    model = write_model(tmp_path / name, **{**CONFIG, **changes})
    main(flags(model, data, tmp_path, *SPHERE, epochs=1))
    assert weights(tmp_path, epoch=1)[MARKER].tolist() == [8, 8, 0]
    loaded = mmts_plugins.load_model(tmp_path / "run/checkpoints/epoch_1.pt")[0]
    size = loaded.visual.image_size
    images = torch.randn(2, 3, *(size if isinstance(size, (tuple, list)) else (size, size)))
    with torch.no_grad():
        for features in (loaded.encode_image(images), loaded.encode_text(batch[1])):
            lengths = features.unflatten(-1, (M, N)).norm(dim=-1)
            torch.testing.assert_close(lengths, torch.full_like(lengths, M**-0.5))
        output = loaded(images, batch[1][:2])
        if isinstance(output, dict):
            torch.testing.assert_close(output["image_features"], loaded.encode_image(images))


def test_the_loss_of_a_distance(batch):
    from mmts_plugins.adapters.openclip_geometry import compare_by

    geometry = Geometry(N, M, "geodesic")
    loss = open_clip.ClipLoss()
    compare_by(loss, geometry)
    torch.manual_seed(0)
    images, texts = (product_normalize(torch.randn(6, 64), M) for _ in range(2))
    value = loss(images, texts, torch.tensor(3.0), output_dict=True)["contrastive_loss"]
    logits, own = -3 * product_geodesic(images, texts, M), torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(value, expected)
    with pytest.raises(SeamError, match="this run has SigLipLoss"):
        compare_by(open_clip.loss.SigLipLoss(), geometry)


FLAGS_REFUSED = {
    "one number": (["--mmts-product-sphere", "8"], {}, "expected N,M"),
    "no product": (["--mmts-product-sphere", "8,4"], {}, "8 * 4 must be the model's embed_dim, which is 64"),
    "lonely tokens": (["--mmts-class-tokens"], {}, "goes with --mmts-product-sphere"),
    "tokens of one": (["--mmts-product-sphere", "64,1", "--mmts-class-tokens"], {}, "M of 2 or more"),
    "distance": (["--mmts-distance", "hyperbolic"], {}, "choose from inner, geodesic, euclidean"),
    "euclidean": ([*SPHERE, "--mmts-distance", "euclidean"], {}, "not normalised"),
    "scale of MM-TS": (
        ["--mmts-logit-scale", "1", "--loss", "mmts", "--mmts-no-shifts"],
        {},
        "--mmts-logit-scale does not go with --loss mmts-infonce",
    ),
    "distance of MM-TS": (
        [*SPHERE, "--mmts-distance", "geodesic", "--loss", "mmts", "--mmts-no-shifts"],
        {},
        "whose temperatures are of cosines",
    ),
    "above the clamp": ([*SPHERE, "--mmts-logit-scale", "14.29"], {}, "raise --mmts-max-logit-scale"),
    "below the clamp": ([*SPHERE, "--mmts-logit-scale", "0.1"], {}, "0.125 to 12.5 in the paper's; raise it"),
    "scripted": ([*SPHERE], {"torchscript": True}, "--torchscript does not go with --mmts-product-sphere"),
    "ranked": ([*SPHERE, "--mmts-distance", "geodesic"], {"val_data": "x.tsv"}, "--val-data: OpenCLIP ranks by inner"),
    "coca": ([*MULTI], {"model": "coca_ViT-B-32"}, "does not go with CoCa"),
    "siglip": (["--mmts-distance", "geodesic"], {"siglip": True}, "not with --siglip"),
    "teacher": ([*SPHERE], {"distill_model": "ViT-B-32", "distill_pretrained": "x"}, "the teacher's logits"),
    "misspelt": (["--mmts-product-spheres", "8,8"], {}, "did you mean --mmts-product-sphere?"),
}


if hasattr(open_clip.factory, "create_task"):
    del FLAGS_REFUSED["scripted"]  # OpenCLIP 4.x has no such flag


@pytest.mark.parametrize(("ours", "options", "message"), FLAGS_REFUSED.values(), ids=FLAGS_REFUSED)
def test_flags_that_are_refused(ours, options, message, model_of_64, data, tmp_path):
    given = {"model": model_of_64, **options}
    with pytest.raises(ConfigError) as caught:
        main(flags(given.pop("model"), data, tmp_path, *ours, **given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.pt"))


def test_another_hosts_flags(data, tmp_path, capsys):
    from mmts_plugins.cli import main as cli

    assert cli(["schedule", "--host", "avion", "--total-steps", "9", *SPHERE]) == 2
    assert "--mmts-product-sphere is for OpenCLIP" in capsys.readouterr().err
    given = ["--loss", "mmts", "--mmts-clusters", str(data.table), "--total-steps", "9", "--host", "openclip"]
    assert cli(["schedule", *given, *SPHERE]) == 0
    assert re.search(r"product_sphere +8,8", capsys.readouterr().out)
    assert cli(["schedule", *given, "--mmts-product-sphere", "8"]) == 2
    assert "expected N,M" in capsys.readouterr().err


# -- checkpoints that say what they are -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(model_of_64, data, tmp_path_factory) -> Path:
    """A run with class tokens, evaluated by the trainer after every epoch."""
    logs = tmp_path_factory.mktemp("trained")
    rows = {line.split("\t")[1]: line for line in data.csv.read_text().splitlines()}
    assert len(rows) == 1 + len(CAPTIONS)
    (logs / "val.tsv").write_text("\n".join(rows.values()))  # each caption once: no ties
    main(flags(model_of_64, data, logs, *MULTI, val_data=logs / "val.tsv", lr=1e-3))
    return logs / "run"


def test_a_resume_that_differs_names_both(trained, model_of_64, data, tmp_path):
    resume = ["--resume", str(trained / "checkpoints/epoch_2.pt"), "--epochs", "3"]
    with pytest.raises(
        ConfigError, match=r"the checkpoint is of Multi\(8, 8\), and this run's model is of PS\(16, 4\)"
    ):
        main(flags(model_of_64, data, tmp_path, "--mmts-product-sphere", "16,4", *resume))
    main(flags(model_of_64, data, tmp_path, name="plain"))
    plain = ["--resume", str(tmp_path / "plain/checkpoints/epoch_2.pt"), "--epochs", "3"]
    with pytest.raises(ConfigError, match=r"has no product sphere, and this run's model is of PS\(8, 8\)"):
        main(flags(model_of_64, data, tmp_path, *SPHERE, *plain, name="other"))


def test_a_remote_checkpoint_needs_the_flags(trained, model_of_64, data, tmp_path):
    import fsspec

    with fsspec.open("memory://run/epoch_2.pt", "wb") as file:
        file.write((trained / "checkpoints/epoch_2.pt").read_bytes())
    resume = ["--resume", "memory://run/epoch_2.pt", "--epochs", "3"]
    with pytest.raises(ConfigError, match="say so, with --mmts-product-sphere 8,8 --mmts-class-tokens"):
        main(flags(model_of_64, data, tmp_path, *resume))
    main(flags(model_of_64, data, tmp_path, *MULTI, *resume, name="with"))
    assert marked(weights(tmp_path, "with", 3)) == Geometry(N, M, class_tokens=True)


def test_plain_weights_start_a_sphere(model_of_64, data, tmp_path):
    """Of the weights of a plain model all but the two projections survive."""
    folder = Path(model_of_64.split(":", 1)[1])
    shutil.copytree(folder, tmp_path / "model")
    plain = make().state_dict()
    torch.save(plain, tmp_path / "model" / "open_clip_pytorch_model.bin")
    arguments = flags(f"local-dir:{tmp_path / 'model'}", data, tmp_path, *MULTI, lr=0.0, epochs=1, wd=0.0)
    main(arguments)
    saved = weights(tmp_path, epoch=1)
    kept = {name for name, value in plain.items() if torch.equal(value, saved[name])}
    assert plain.keys() - kept == {"visual.proj", "text_projection"}
    torch.save(saved, tmp_path / "model" / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"the weights that were loaded are of Multi\(8, 8\)"):
        main(flags(f"local-dir:{tmp_path / 'model'}", data, tmp_path, *SPHERE, name="mixed"))


PATHS = f"import sys; sys.path += {[path for path in sys.path if path.endswith(('site-packages', 'src'))]!r}\n"
FRESH = """
import json, sys, torch, open_clip
folder, csv = sys.argv[1:3]
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
model.eval()
from PIL import Image
rows = [line.split("\\t") for line in open(csv).read().splitlines()[1:]]
tokenize = open_clip.get_tokenizer("local-dir:" + folder)
with torch.no_grad():
    images = model.encode_image(torch.stack([preprocess(Image.open(name)) for name, _ in rows]))
    texts = model.encode_text(tokenize([text for _, text in rows]))
scores = images @ texts.T
found = {}
for name, each in (("image_to_text", scores), ("text_to_image", scores.T)):
    places = (each.argsort(1, descending=True) == torch.arange(len(rows))[:, None]).nonzero()[:, 1]
    for k in (1, 5, 10):
        found[f"{name}_R@{k}"] = (places < k).double().mean().item()
print("FOUND " + json.dumps(found))
print("TYPE " + type(model).__name__)
"""


@pytest.fixture(scope="module")
def released(trained, model_of_64, tmp_path_factory) -> Path:
    """As people publish a model: a folder with the config and the weights."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copy(Path(model_of_64.split(":", 1)[1]) / "open_clip_config.json", folder)
    saved = torch.load(trained / "checkpoints/epoch_2.pt", weights_only=True)["state_dict"]
    torch.save(saved, folder / "open_clip_pytorch_model.bin")
    return folder


def test_a_fresh_process_loads_it_without_a_flag(trained, released):
    done = run_python("-c", FRESH, released, trained.parent / "val.tsv")
    assert done.returncode == 0, done.stdout
    assert "TYPE ProductSphereCLIP" in done.stdout
    found = json.loads(re.search("FOUND (.*)", done.stdout)[1])
    lines = (trained / "checkpoints/results.jsonl").read_text().splitlines()
    logged = json.loads(lines[-1])
    assert len(lines) == 2
    assert {name: logged[name] for name in found} == pytest.approx(found, abs=1e-9)


def test_without_the_plugin_it_fails_with_the_markers_name(released, data):
    """-S: no start-up file is read, as where the plugin is not installed."""
    done = run_python("-S", "-c", PATHS + FRESH, released, data.csv)
    assert done.returncode != 0
    assert MARKER in done.stdout


def test_custom_text_models_take_the_weights_of_plain_ones_and_back(batch, tmp_path):
    multi = converted(True)
    path = tmp_path / "w.pt"
    torch.save(multi.state_dict(), path)
    other = make(custom_text=True)
    open_clip.load_checkpoint(other, str(path))
    assert geometry_of(other) == Geometry(N, M, class_tokens=True)
    with torch.no_grad():
        assert torch.equal(other.encode_text(batch[1]), multi.encode_text(batch[1]))


def test_a_damaged_marker(batch, tmp_path):
    state = converted(False).state_dict()
    for marker in (torch.tensor([0, 8, 0]), torch.tensor([8, 8, 9]), torch.tensor([8, 8])):
        torch.save({**state, MARKER: marker}, tmp_path / "w.pt")
        with pytest.raises(ConfigError, match=f"the checkpoint's {MARKER} is"):
            open_clip.load_checkpoint(make(), str(tmp_path / "w.pt"))


TRAINS = """
import sys
from open_clip_train.main import main
assert any(name.startswith("mmts_plugins") for name in sys.modules) is (sys.argv[1] == "with")
main(sys.argv[2:])
"""


def test_a_run_that_asks_for_nothing_equals_one_without_the_plugin(model_of_64, data, tmp_path):
    """Losses, logs and checkpoints to the bit: the seams that every process has pass through."""
    lines = []
    for name, before in (("with", ("-c", TRAINS)), ("without", ("-S", "-c", PATHS + TRAINS))):
        done = run_python(*before, name, *flags(model_of_64, data, tmp_path, name=name, val_data=data.csv))
        assert done.returncode == 0, done.stdout[-2000:]
        log = (tmp_path / name / "out.log").read_text()
        lines.append(re.findall(r"Logit Scale.*|clip_val_loss.*", log))
        assert len(lines[-1]) == 12 + 2
    assert lines[0] == lines[1]
    one, other = (
        torch.load(tmp_path / name / "checkpoints/epoch_2.pt", weights_only=True) for name in ("with", "without")
    )
    assert equal(one["state_dict"], other["state_dict"])
    for number, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][number][key]) for key, value in state.items())


def test_a_seam_that_has_changed_is_no_business_of_who_did_not_ask(tmp_path):
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text("")
    (tmp_path / "open_clip" / "factory.py").write_text("def create_model(name): return name\n")
    (tmp_path / "open_clip" / "convert.py").write_text("")
    script = "import open_clip.factory, open_clip.convert\nprint(open_clip.factory.create_model('x'))"
    done = run_python("-c", script, PYTHONPATH=str(tmp_path))
    assert done.stdout == "x\n"
    done = run_python("-c", "import mmts_plugins; mmts_plugins.install()\n" + script, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "open_clip.factory.create_model has changed: no parameter 'model_name'" in done.stdout


def test_nothing_is_touched_where_nothing_is_marked(batch, tmp_path):
    plain = make()
    torch.save(plain.state_dict(), tmp_path / "w.pt")
    other = make()
    open_clip.load_checkpoint(other, str(tmp_path / "w.pt"))
    assert type(other) is open_clip.CLIP
    assert not other._load_state_dict_pre_hooks


def test_load_model_finds_what_it_needs(trained, released, tmp_path):
    import mmts_plugins

    checkpoint = trained / "checkpoints" / "epoch_2.pt"
    for path in (checkpoint, released):
        model, _, tokenizer = mmts_plugins.load_model(path)
        assert geometry_of(model) == Geometry(N, M, class_tokens=True)
        assert not model.training
        assert tokenizer("x").shape == (1, 12)
    shutil.copy(checkpoint, tmp_path / "w.pt")
    with pytest.raises(MMTSError, match=r"w\.pt: no params\.txt in the folder above says which model this is"):
        mmts_plugins.load_model(tmp_path / "w.pt")
    with pytest.raises(MMTSError, match=r"none\.pt: no such checkpoint"):
        mmts_plugins.load_model(tmp_path / "none.pt")


@pytest.fixture(scope="module")
def geodesic(model_of_64, data, tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("geodesic")
    main(flags(model_of_64, data, logs, *SPHERE, "--mmts-distance", "geodesic", lr=1e-3))
    main(flags(model_of_64, data, logs, "--mmts-distance", "euclidean", lr=1e-3, name="euclidean"))
    return logs


def evaluated(data: Any, tmp_path: Path, *ours: Any) -> dict[str, float]:
    from mmts_plugins.cli import main as cli

    rows = {line.split("\t")[1]: line for line in data.csv.read_text().splitlines()}
    (tmp_path / "val.tsv").write_text("\n".join(rows.values()) + "\n")
    output = tmp_path / "eval.json"
    given = [str(tmp_path / "val.tsv"), "-o", str(output), "--force", "--resamples", "0", *map(str, ours)]
    assert cli(["eval", *given]) == 0
    return {name: entry["value"] for name, entry in json.loads(output.read_text())["metrics"].items()}


def test_mmts_eval_gives_the_recalls_that_the_trainer_logged(trained, data, tmp_path):
    found = evaluated(data, tmp_path, "--checkpoint", trained / "checkpoints/epoch_2.pt")
    logged = json.loads((trained / "checkpoints/results.jsonl").read_text().splitlines()[-1])
    names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert {name: found[name] for name in names} == pytest.approx({name: logged[name] for name in names}, abs=1e-9)


@pytest.mark.parametrize("name", ["run", "euclidean"])
def test_mmts_eval_ranks_by_the_models_own_distance(name, geodesic, data, tmp_path):
    import mmts_plugins

    checkpoint = geodesic / name / "checkpoints" / "epoch_2.pt"
    found = evaluated(data, tmp_path, "--checkpoint", checkpoint)
    model, preprocess, tokenizer = mmts_plugins.load_model(checkpoint)
    from PIL import Image

    rows = [line.split("\t") for line in (tmp_path / "val.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(Image.open(path)) for path, _ in rows]))
        texts = model.encode_text(tokenizer([text for _, text in rows]))
    if name == "run":
        u, v = (M**0.5 * each.unflatten(-1, (M, N)) for each in (images, texts))
        away = torch.einsum("imn,jmn->ijm", u, v).clamp(-1, 1).arccos().square().sum(-1).sqrt()
    else:
        assert float((images.norm(dim=-1) - 1).abs().min()) > 0.01, "normalised"
        away = (images[:, None] - texts).norm(dim=-1)
    for way, scores in (("image_to_text", away), ("text_to_image", away.T)):
        rank = (scores < scores.diagonal()[:, None]).sum(1) + 1
        assert found[f"{way}_mean_rank"] == pytest.approx(float(rank.double().mean()))
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(CAPTIONS) + "\n")
    (tmp_path / "templates.txt").write_text("{}\na picture of {}\n")
    zero_shot = ("--classes", classes, "--label-column", "title", "--templates", tmp_path / "templates.txt")
    found = evaluated(data, tmp_path, "--checkpoint", checkpoint, "--no-retrieval", *zero_shot)
    with torch.no_grad():
        prompts = [text.format(each) for text in ("{}", "a picture of {}") for each in CAPTIONS]
        each = model.encode_text(tokenizer(prompts))
    compare = geometry_of(model).distances
    of_classes = compare(images, each).view(len(rows), 2, len(CAPTIONS)).mean(1)
    own = torch.tensor([CAPTIONS.index(text) for _, text in rows])
    assert found["zero_shot_top1"] == pytest.approx(float((of_classes.argmin(1) == own).double().mean()))


def test_a_mean_over_templates_of_distances_is_not_that_of_features():
    from mmts_plugins.evaluation.retrieval import class_embeddings, class_ranks, mean_over

    torch.manual_seed(0)
    images = F.normalize(torch.randn(400, 8), dim=1)
    prompts = F.normalize(torch.randn(20, 3, 8), dim=-1)
    labels = torch.arange(400) % 20
    by_distances = class_ranks(images, prompts.flatten(1), labels, mean_over(3))
    scores = torch.einsum("id,ctd->ict", images, prompts).mean(2)
    expected = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert torch.equal(by_distances, expected)
    by_features = class_ranks(images, class_embeddings(prompts.flatten(0, 1), torch.arange(60) // 3, 20), labels)
    assert not torch.equal(by_features, by_distances)


def test_a_subset_of_the_spheres(trained, data, tmp_path, capsys):
    from mmts_plugins.cli import main as cli

    checkpoint = trained / "checkpoints/epoch_2.pt"
    whole = evaluated(data, tmp_path, "--checkpoint", checkpoint)
    assert evaluated(data, tmp_path, "--checkpoint", checkpoint, "--sub-spheres", M) == whole
    some = [evaluated(data, tmp_path, "--checkpoint", checkpoint, "--sub-spheres", 1, "--seed", s) for s in (0, 1, 2)]
    assert any(each != whole for each in some)
    again = evaluated(data, tmp_path, "--checkpoint", checkpoint, "--sub-spheres", 1, "--seed", 1)
    assert again == some[1]
    given = [str(tmp_path / "val.tsv"), "-o", str(tmp_path / "x.json"), "--checkpoint", str(checkpoint)]
    assert cli(["eval", *given, "--sub-spheres", "9"]) == 2
    assert "--sub-spheres 9: the model is of Multi(8, 8)" in capsys.readouterr().err


LOADS = """
import sys, torch
assert not any("open_clip" in name or "mmts" in name for name in sys.modules)
model, given = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
for name in ("encode_image", "encode_text"):
    difference = (getattr(model, name)(given[name + "_in"]) - given[name]).abs().max().item()
    assert difference <= 1e-6, difference
assert not any("open_clip" in name or "mmts" in name for name in sys.modules)
print("EQUAL")
"""


@pytest.mark.parametrize("kind", ["trained", "geodesic"])
def test_an_export_needs_neither_openclip_nor_the_plugin(kind, request, batch, tmp_path, capsys):
    import mmts_plugins
    from mmts_plugins.cli import main as cli

    run = request.getfixturevalue(kind)
    run = run if kind == "trained" else run / "run"
    checkpoint = run / "checkpoints" / "epoch_2.pt"
    assert cli(["export", str(checkpoint), "-o", str(tmp_path / "model.pt")]) == 0
    said = capsys.readouterr().out
    assert ("Multi(8, 8)" in said) is (kind == "trained")
    model = mmts_plugins.load_model(checkpoint)[0]
    with torch.no_grad():
        given = {"encode_image_in": batch[0], "encode_image": model.encode_image(batch[0])}
        given |= {"encode_text_in": batch[1], "encode_text": model.encode_text(batch[1])}
    torch.save(given, tmp_path / "given.pt")
    done = run_python("-S", "-c", PATHS + LOADS, tmp_path / "model.pt", tmp_path / "given.pt")
    assert done.stdout.endswith("EQUAL\n"), done.stdout
    assert cli(["export", str(checkpoint), "-o", str(tmp_path / "model.pt")]) == 2
    assert "exists already; pass --force" in capsys.readouterr().err


def test_the_one_line_for_the_sphere_alone(model_of_64, data, batch, tmp_path, capsys):
    import mmts_plugins
    from mmts_plugins.cli import main as cli

    main(flags(model_of_64, data, tmp_path, *SPHERE, epochs=1))
    checkpoint = tmp_path / "run/checkpoints/epoch_1.pt"
    capsys.readouterr()
    assert cli(["export", str(checkpoint), "-o", str(tmp_path / "model.pt")]) == 0
    line = re.search(r"x = (F\.normalize.*)", capsys.readouterr().out)[1]
    plain = make()
    state = weights(tmp_path, epoch=1)
    del state[MARKER]
    plain.load_state_dict(state)
    with torch.no_grad():
        x = plain.encode_image(batch[0])
        assert line == "F.normalize(x.unflatten(-1, (8, 8)), dim=-1).flatten(-2) / 8 ** 0.5"
        by_hand = F.normalize(x.unflatten(-1, (8, 8)), dim=-1).flatten(-2) / 8**0.5
        torch.testing.assert_close(by_hand, mmts_plugins.load_model(checkpoint)[0].encode_image(batch[0]))
