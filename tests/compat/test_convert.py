"""Old checkpoints, against a plain restatement of the published equations."""

from __future__ import annotations

import pickle
from pathlib import Path

import old_layouts  # beside this file, where pytest looks
import pytest
import restated
import torch

from equilibria import Broyden, UserError
from equilibria.cli.main import main
from equilibria.compat.convert import convert
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.stacked_transformer import StackedTransformerConfig

SOLVE = SolveConfig(solver=Broyden(None), rtol=1e-12, max_steps=300)
TOKENS = torch.tensor([3, 19, 5, 0, 11, 8])


def saved(old, tmp_path: Path, name: str = "old.pkl") -> Path:
    torch.save(old, tmp_path / name)
    return tmp_path / name


def built(converted):
    model = converted.config.build(converted.vocabulary_size)
    model.load_state_dict(converted.weights)
    return model.double().eval()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("normed", [True, False], ids=["weight-norm", "plain"])
@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "full"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_transformers_compute_the_same(version, normed, adaptive, norm, tmp_path):
    old = old_layouts.transformer(version=version, normed=normed, adaptive=adaptive)
    converted = convert(saved(old, tmp_path), DEQTransformerConfig(norm=norm, solve=SOLVE))
    model = built(converted)
    output = model(TOKENS.unsqueeze(0))
    assert output.solution.converged.all()
    z, _ = restated.transformer_equilibrium(old, TOKENS, pre=norm == "pre")
    wanted = restated.adaptive_log_probabilities(old, z)
    found = output.logits[0].double().log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own"])
@pytest.mark.parametrize("width", [8, 6])
def test_one_cluster_with_a_projection(tied, width, tmp_path):
    """--div_val without --adaptive; also where the embedding is as wide as the model."""
    old = old_layouts.transformer(adaptive=False)
    old["word_emb.emb_layers.0.weight"] = old_layouts.drawn(old_layouts.V, width)
    old["crit.out_layers.0.weight"] = old["word_emb.emb_layers.0.weight"]
    projection = old["word_emb.emb_projs.0.weight"] = old_layouts.drawn(8, width)
    old["crit.out_projs.0.weight"] = projection if tied else old_layouts.drawn(8, width)
    converted = convert(saved(old, tmp_path), DEQTransformerConfig(solve=SOLVE))
    output = built(converted)(TOKENS.unsqueeze(0))
    assert output.solution.converged.all()
    z, _ = restated.transformer_equilibrium(old, TOKENS)
    wanted = restated.adaptive_log_probabilities(old, z)
    found = output.logits[0].double().log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert ("a column of zeros" in converted.report()) == (width == 8)


def test_transformers_with_memory_and_window(tmp_path):
    old = old_layouts.transformer()
    config = DEQTransformerConfig(attention_window=3, solve=SOLVE)
    model = built(convert(saved(old, tmp_path), config))
    first = model(TOKENS[:3].unsqueeze(0), memory_length=6)
    second = model(TOKENS[3:].unsqueeze(0), first.memory)
    _, memory = restated.transformer_equilibrium(old, TOKENS[:3], window=3)
    z, _ = restated.transformer_equilibrium(old, TOKENS[3:], memory, window=3)
    wanted = restated.adaptive_log_probabilities(old, z)
    torch.testing.assert_close(second.logits[0].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normed", [True, False], ids=["weight-norm", "plain"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_models_of_torchdeq_compute_the_same(normed, blocks, tmp_path):
    """After as many steps; twelve are published, and there is no equilibrium."""
    old = old_layouts.torchdeq(normed=normed, blocks=blocks)
    config = StackedTransformerConfig(attention_window=4, num_steps=5)
    model = built(convert(saved(old, tmp_path), config))
    first = model(TOKENS[:3].unsqueeze(0), memory_length=6)
    second = model(TOKENS[3:].unsqueeze(0), first.memory)
    _, memory = restated.torchdeq_steps(old, TOKENS[:3], 5, window=4)
    z, _ = restated.torchdeq_steps(old, TOKENS[3:], 5, memory, window=4)
    wanted = restated.adaptive_log_probabilities(old, z)
    found = second.logits[0].double().log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normed", [True, False], ids=["weight-norm", "plain"])
@pytest.mark.parametrize("experts", [0, 1, 3])
@pytest.mark.parametrize("dropped", [True, False], ids=["dropconnect", "whole"])
@pytest.mark.parametrize("part", [None, 2], ids=["at once", "in parts"])
def test_trellisnets_compute_the_same(normed, experts, dropped, part, tmp_path):
    if dropped and not normed:
        pytest.skip("DropConnect without weight norm is refused (test_changed_tensors.py)")
    old = old_layouts.trellisnet(normed=normed, experts=experts, dropped=dropped)
    config = DEQTrellisNetConfig(solve=SOLVE, subsequence_length=part)
    model = built(convert(saved(old, tmp_path), config))
    output = model(TOKENS[:3].unsqueeze(0), memory_length=1)
    assert output.solution.converged.all()
    plain = {name.removesuffix("_raw"): value for name, value in old.items()}
    net = "trellisnet.module" if dropped else "trellisnet"
    h, c = restated.trellis_equilibrium(plain, TOKENS[:3], net=net)
    wanted = restated.trellis_log_probabilities(old, h)
    found = output.logits[0].double().log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    second = model(TOKENS[3:].unsqueeze(0), output.memory)
    h, _ = restated.trellis_equilibrium(plain, TOKENS[3:], (h[-1:], c[-1:]), net=net)
    wanted = restated.trellis_log_probabilities(old, h)
    found = second.logits[0].double().log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_every_tensor_is_accounted_for(tmp_path):
    old = old_layouts.transformer(version=1)
    converted = convert(saved({f"module.{k}": v for k, v in old.items()}, tmp_path))
    assert set(converted.mapped) | set(converted.left) == set(old)
    report = converted.report()
    assert len(report.splitlines()) == len(old)
    assert "func_copy.pos_ff.ff1_net.bias" in report
    assert converted.config.num_heads == 2
    assert converted.config.cutoffs == (4, 9)
    assert converted.config.div_val == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda old: old.pop("func.pos_ff.ff1_net.bias"),
            "has no tensor 'func.pos_ff.ff1_net.bias'",
        ),
        (lambda old: old.update({"extra.weight": torch.ones(2)}), "1 tensors .* unknown: extra"),
        (lambda old: old.update({"inject_conv.weight": torch.ones(9, 9)}), "where .* is needed"),
        (
            lambda old: old.update({"crit.out_layers.0.weight": torch.ones(4, 8)}),
            "trained with --not_tied cannot be converted",
        ),
        (
            lambda old: old.update({"crit.out_projs.1.weight": torch.ones(8, 4)}),
            "crit.out_projs.1.weight is not embedding.projections.1",
        ),
    ],
)
def test_checkpoints_that_are_not_what_they_should_be(change, message, tmp_path):
    old = old_layouts.transformer()
    change(old)
    with pytest.raises(UserError, match=message):
        convert(saved(old, tmp_path))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        convert(tmp_path / "nowhere.pkl")
    (tmp_path / "text.pkl").write_text("hello")
    with pytest.raises(UserError, match="cannot be read without running code") as error:
        convert(tmp_path / "text.pkl")
    assert "weights_only" not in str(error.value).replace("Weights only load failed", "")
    with pytest.raises(UserError, match="holds no state dict"):
        convert(saved([1, 2], tmp_path))
    with pytest.raises(UserError, match="of no model that is converted"):
        convert(saved({"a.weight": torch.ones(2)}, tmp_path))
    with pytest.raises(UserError, match="of another model than DEQTrellisNetConfig"):
        convert(saved(old_layouts.transformer(), tmp_path), DEQTrellisNetConfig())


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match="cannot be read without running code"):
        convert(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


def write_text_of(num_words: int, folder: Path) -> None:
    """Words and <eos>, as many as an old model has."""
    folder.mkdir(exist_ok=True)
    text = " ".join(f"w{i}" for i in range(num_words - 1)) + "\n"
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(text * 60)


def test_the_command_makes_a_run_that_can_be_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    write_text_of(20, tmp_path / "text")
    path = saved(old_layouts.transformer(adaptive=False), tmp_path)
    runs = tmp_path / "runs"
    options = ["--recipe", "ptb-small", "--folder", str(runs), "--data", str(tmp_path / "text")]
    assert main(["convert", str(path), *options]) == 2  # it is not the Penn Treebank
    assert "text of your own, without a name (--data.name None)" in capsys.readouterr().err
    options += ["--data.name", "None"]
    assert main(["convert", str(path), *options]) == 0
    assert "tensors mapped" in capsys.readouterr().out
    (run,) = runs.iterdir()
    assert "word_emb.emb_layers.0.weight" in (run / "conversion.txt").read_text()
    assert main(["eval", str(run), "--mem-len", "8"]) == 0
    assert "perplexity" in capsys.readouterr().out

    assert main(["share", str(run), "--folder", str(tmp_path / "shared")]) == 0
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "converted by equilibria from a checkpoint of another code base" in card
    assert "not finished" not in card
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert "converted from a checkpoint of another" in (tmp_path / "page.html").read_text()

    assert main(["train", "--resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert "was made by 'equilibria convert' and has no training state" in message
    assert "delete" not in message

    write_text_of(3, tmp_path / "text")
    assert main(["convert", str(path), *options]) == 2
    assert "20 token ids, and the text has 3" in capsys.readouterr().err


def test_what_the_command_is_given(tmp_path, capsys):
    assert main(["convert"]) == 2
    assert "give the checkpoint to convert" in capsys.readouterr().err
    assert main(["convert", str(tmp_path)]) == 2
    assert "is a folder; give the checkpoint's file" in capsys.readouterr().err
    assert main(["convert", "old.pkl", "--recipe=nowhere"]) == 2
    assert "no recipe is called 'nowhere'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert "--data.folder" in text
    assert "--data.name" in text
