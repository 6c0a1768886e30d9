"""Would the tests notice? Breaks one line at a time and runs the tests that should care.

    python tests/mutation_check.py                     # every mutation of every file
    python tests/mutation_check.py solvers/anderson    # those of one file
    python tests/mutation_check.py --num-per-file 3    # a sample
    python tests/mutation_check.py --list              # what there is, without running

A mutation replaces one piece of text: a sign, a term, a transpose, an index. It is made in a
temporary copy of src and tests; the working tree is never touched. The tests of the file run
with `-x`; a mutation that they let pass is a survivor. Exit status: 0 if all were noticed, 1 if
some survived, 2 if a mutation no longer fits its file (the code has changed: update the list).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300  # a mutation that loops for ever is noticed, too


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new`; `old` occurs exactly once, or `nth` says which occurrence."""

    old: str
    new: str
    nth: int = 0
    """0: the only occurrence; 1, 2, ...: counted from the top."""


@dataclass(frozen=True)
class Target:
    """A source file, the tests that guard it, and how it is broken."""

    file: str
    tests: tuple[str, ...]
    mutations: tuple[Mutation, ...]


def contract(file: str, name: str) -> str:
    """The contract tests of one class."""
    return f"tests/testing/test_{file}.py::{name}"


TARGETS = (
    Target(
        "solvers/picard",
        ("tests/solvers/test_picard.py", contract("solvers", "TestPicard")),
        (
            Mutation("iterate.z.lerp(iterate.fz", "iterate.fz.lerp(iterate.z"),
            Mutation("lerp(iterate.fz, self.relaxation)", "lerp(iterate.fz, 1.0)"),
            Mutation("return iterate.fz, None", "return iterate.z, None"),
        ),
    ),
    Target(
        "solvers/anderson",
        (
            "tests/solvers/test_anderson.py",
            "tests/solvers/test_anderson_variants.py",
            contract("solvers", "TestAnderson"),
        ),
        (
            Mutation("gamma, images, alpha=-1.0)", "gamma, images, alpha=1.0)"),
            Mutation("return z - (1.0 - self.relaxation) * mixed", "return z"),
            Mutation("(scale, 1.0 + settings.ridge)", "(scale, 1.0)"),
            Mutation(".roll(-(newest + 1), 1).flip(1)", ".roll(newest + 1, 1).flip(1)"),
            Mutation("torch.where(sines >= min_angle", "torch.where(sines >= 0.0"),
            Mutation("state.gram.set_row(slot, row)", "pass"),
            Mutation("alpha=-1.0 if self.kind", "alpha=1.0 if self.kind"),
            Mutation("scale, -right)", "scale, right)"),
            Mutation("by_step - over_images", "by_step - by_image"),
            Mutation("norm > self._factor * self._best_norm", "norm > torch.inf * self._best_norm"),
            Mutation("gamma.detach().sum(1, keepdim=True)", "gamma.detach()"),
        ),
    ),
    Target(
        "solvers/broyden",
        (
            "tests/solvers/test_broyden.py",
            "tests/adjoints/test_shine.py",
            contract("solvers", "TestBroyden"),
        ),
        (
            Mutation("set_row(slot, inner_products(new_step, images))", "set_row(slot, by_image)"),
            Mutation(
                "born.unsqueeze(2) <= born.unsqueeze(1)", "born.unsqueeze(2) >= born.unsqueeze(1)"
            ),
            Mutation("(squares) - state.by_images", "(squares) + state.by_images"),
            Mutation("(squares), -right)", "(squares), right)"),
            Mutation("iterate.residual, previous.residual", "iterate.residual, previous.fz"),
            Mutation("older - _products(vectors", "older + _products(vectors"),
            Mutation("self._system = -older", "self._system = older"),
            Mutation("self._system.mT", "self._system"),
            Mutation("(state.latest, iterate)", "(iterate,)"),
            Mutation("torch.where(rows[:, 0], count, kept)", "count"),
            Mutation("(length > 0) & torch.isfinite(length)", "length >= 0"),
            Mutation("if full:", "if True:"),
            Mutation("iterate.z.lerp(target, self.relaxation)", "target"),
            Mutation("if self.line_search else evaluate(z)", "if False else evaluate(z)"),
            Mutation("weights = scale * torch", "weights = torch"),
        ),
    ),
    Target(
        "solvers/newton_krylov",
        ("tests/solvers/test_newton_krylov.py", contract("solvers", "TestNewtonKrylov")),
        (
            Mutation("target = iterate.z + direction", "target = iterate.z - direction"),
            Mutation("target = iterate.z + direction", "target = iterate.fz + direction"),
            Mutation("torch.where(usable, solution.u, residual)", "solution.u"),
            Mutation("0.9 * ratio.square()", "0.9 * ratio"),
            Mutation("torch.where(moved, residual, 0.0)", "residual"),
        ),
    ),
    Target(
        "solvers/reversible",
        ("tests/solvers/test_reversible.py", contract("solvers", "TestReversible")),
        (
            Mutation("iterate.z.lerp(evaluate(y).fz", "iterate.z.lerp(iterate.fz"),
            Mutation("y = state.y.lerp(", "y = iterate.z.lerp("),
            Mutation("-2.0 * math.log1p", "-1.0 * math.log1p"),
            Mutation("if max_steps > limit", "if max_steps > 2 * limit"),
        ),
    ),
    Target(
        "solvers/fallback",
        ("tests/solvers/test_fallback.py", contract("solvers", "TestFallback")),
        (
            Mutation("return choose(stuck, self._best, result)", "return result"),
            Mutation("| ~torch.isfinite(norm)", ""),
            Mutation("stuck | (norm > self._settings.growth", "stuck | (norm > torch.inf"),
            Mutation("self._level + 1", "self._level"),
            Mutation("torch.where(progress, 0, self._waited + 1)", "self._waited + 1"),
            Mutation("self._moving = ~(held & wanted)", "self._moving = ~held"),
        ),
    ),
    Target(
        "core/backtracking",
        (
            "tests/core/test_backtracking.py",
            "tests/solvers/test_broyden.py",
            "tests/solvers/test_newton_krylov.py",
            "tests/solvers/test_robust_solvers.py",
        ),
        (
            Mutation("share *= 0.5", "share *= 2.0"),
            Mutation("choose(better, trial, best)", "trial"),
            Mutation("norm < best_norm", "norm > best_norm"),
            Mutation("start.z.lerp(target, share), best.z", "start.z.lerp(target, share), start.z"),
        ),
    ),
    Target(
        "linear/gmres",
        ("tests/linear/test_gmres.py", contract("linear_solvers", "TestGMRES")),
        (
            Mutation("-torch.cat((column, length", "torch.cat((column, length"),
            Mutation("projected[:, k] += 1.0", "projected[:, k] -= 1.0"),
            Mutation("(cos, sin, -sin, cos)", "(cos, sin, sin, cos)"),
            Mutation("rotation[:, :, 0] * self", "rotation[:, 0] * self"),
            Mutation("torch.where(exhausted, 1.0, sin)", "sin"),
            Mutation("again = inner_products", "again = 0 * inner_products"),
            Mutation("return self._u + correction", "return self._u - correction"),
            Mutation("self._a(self.u) + self._b - self.u", "self._a(self.u) + self._b"),
            Mutation("upper=True", "upper=False"),
        ),
    ),
    Target(
        "linear/bicgstab",
        (contract("linear_solvers", "TestBiCGStab"),),
        (
            Mutation("v = p - a(p)", "v = p + a(p)"),
            Mutation("t = s - a(s)", "t = s"),
            Mutation("s = r - alpha * v", "s = r + alpha * v"),
            Mutation("u + alpha * p + omega * s", "u + alpha * p"),
            Mutation("s - omega * t", "s + omega * t"),
            Mutation("r + beta * (p - omega * v)", "r + beta * p"),
            Mutation("_ratio(alpha, omega)", "_ratio(omega, alpha)"),
        ),
    ),
    Target(
        "linear/neumann",
        (contract("linear_solvers", "TestNeumann"),),
        (
            Mutation("u + term, a(term)", "u, a(term)"),
            Mutation("torch.where(active, u + term, u)", "torch.where(active, u - term, u)"),
            Mutation("(norm < residual)", "(norm > residual)"),
            Mutation("resolved & (norm <= tolerance)", "resolved | (norm <= tolerance)"),
        ),
    ),
    Target(
        "linear/fixed_point",
        (contract("linear_solvers", "TestFixedPointAnderson"),),
        (
            Mutation("lambda u: a(u) + b", "lambda u: a(u) - b"),
            Mutation("self.atol + self.rtol * self.reference", "self.atol + self.rtol"),
            Mutation(
                "relative_residual=result.measurement.residual / scale",
                "relative_residual=result.measurement.residual",
            ),
            Mutation("accepted = resolved & ", "accepted = resolved | "),
        ),
    ),
    Target(
        "adjoints/implicit",
        (
            "tests/adjoints/test_implicit.py",
            "tests/adjoints/test_second_derivatives.py",
            "tests/adjoints/test_replay.py",
            "tests/warm_starts/test_backward.py",
            contract("adjoints", "TestImplicit"),
        ),
        (
            Mutation("output = z.clone()", "output = z"),
            Mutation("rtol=self.rtol", "rtol=1e-1"),
            Mutation("return result.u", "return -result.u"),
            Mutation("return result.u", "return b"),
            Mutation("self.is_open = False", "self.is_open = True"),
            Mutation("nested = is_nested(self._inputs)", "nested = False"),
            Mutation("self._replay.as_then(), exchange", "exchange"),
            Mutation("self._replay.check(image)", "pass"),
            Mutation("torch.clear_autocast_cache()", "pass"),
            Mutation("ctx.set_materialize_grads(False)", "pass", nth=2),
            Mutation("u=times_power_of_two(result.u, exponent)", "u=result.u"),
            Mutation("self.atol), -exponent)", "self.atol), exponent)"),
            Mutation("self._border.closed() if self._border", "nullcontext() if self._border"),
            Mutation("gate.through(g) if g.requires_grad", "g.detach() if g.requires_grad"),
        ),
    ),
    Target(
        "adjoints/one_step",
        ("tests/adjoints/test_other_adjoints.py", contract("adjoints", "TestOneStep")),
        (
            Mutation("forward.problem.image(z.detach())", "-forward.problem.image(z.detach())"),
            Mutation("AttachGraph.apply(z", "AttachGraph.apply(2.0 * z"),
            Mutation("image(z.detach())", "image(2.0 * z.detach())"),
        ),
    ),
    Target(
        "adjoints/phantom",
        ("tests/adjoints/test_other_adjoints.py", contract("adjoints", "TestPhantom")),
        (
            Mutation("range(self.num_steps)", "range(self.num_steps + 1)"),
            Mutation("path.lerp(", "path.detach().lerp("),
            Mutation("), self.relaxation)", "), 1.0)"),
            Mutation("AttachGraph.apply(z", "AttachGraph.apply(path"),
        ),
    ),
    Target(
        "adjoints/neumann_series",
        ("tests/adjoints/test_neumann_series.py", contract("adjoints", "TestNeumannSeries")),
        (
            Mutation("total = total + term", "total = total - term"),
            Mutation("range(self.num_terms)", "range(self.num_terms - 1)"),
            Mutation("total = term = g", "total, term = 0.0 * g, g"),
            Mutation("longest / length, 1.0", "length / longest, 1.0"),
        ),
    ),
    Target(
        "adjoints/unrolled",
        (
            "tests/adjoints/test_other_adjoints.py",
            "tests/adjoints/test_neumann_series.py",  # has those of checkpointing
            contract("adjoints", "TestUnrolled"),
        ),
        (
            Mutation("return z.clone()", "return z.detach()"),
            Mutation("return z.clone()", "return z"),
            Mutation("forward.problem.checkpoint = self.checkpoint", "pass"),
        ),
    ),
    Target(
        "adjoints/shine",
        ("tests/adjoints/test_shine.py",),
        (
            Mutation("v - step + product(step)", "v - step - product(step)"),
            Mutation("precondition(result.u), u)", "result.u, u)"),
            Mutation("length <= self.max_ratio * rms(g)", "length <= self.max_ratio"),
            Mutation("torch.where(rows, estimate(v), v)", "estimate(v)"),
            Mutation("max_steps=self.refinement + 1", "max_steps=self.refinement - 1"),
            Mutation("usable = torch.isfinite(length)", "usable = length > length"),
        ),
    ),
    Target(
        "adjoints/reversible_adjoint",
        ("tests/adjoints/test_reversible_adjoint.py",),
        (
            Mutation("z_bar = z_bar + pulled", "z_bar = z_bar - pulled"),
            Mutation("y_bar = y_bar + pulled", "y_bar = pulled"),
            Mutation("b * z_bar, 0.0", "z_bar, 0.0"),
            Mutation("rest * y_bar, 0.0", "y_bar, 0.0"),
            Mutation("y = image.lerp(y, 1.0 / rest)", "y = image.lerp(y, rest)"),
            Mutation("rows & (self._num_steps >= step)", "rows & (self._num_steps > step)"),
            Mutation("else total + gradient", "else gradient"),
            Mutation("z_bar + y_bar, 0.0)", "z_bar, 0.0)"),
            Mutation("sweep.error <= self", "sweep.error >= self"),
            Mutation("detach().clone()  # it may", "detach()  # it may"),
            Mutation("if is_nested(self.inputs) else", "if False else"),
            Mutation("sweep = self._sweep(g, ~lost)", "pass"),
        ),
    ),
    Target(
        "core/jacobian",
        ("tests/adjoints/test_implicit.py", contract("adjoints", "TestImplicit")),
        (
            Mutation("at.fz, at.z, u,", "at.fz, at.z, -u,"),
            Mutation("create_graph=create_graph", "create_graph=False"),
        ),
    ),
    Target(
        "core/replay",
        ("tests/adjoints/test_replay.py",),
        (
            Mutation("stack.enter_context(exchanged(entries, then))", "pass"),
            Mutation("buffer.data.copy_(before)", "pass"),
            Mutation("rms(difference) <= self", "rms(difference) >= self"),
            Mutation("(off <= self._tolerance", "(off >= self._tolerance"),
            Mutation("image - self._image)", "image - image)"),
            Mutation("entries.update(now)", "pass"),
        ),
    ),
    Target(
        "core/linear",
        (
            "tests/warm_starts/test_backward.py",
            "tests/linear/test_gmres.py",
            contract("linear_solvers", "TestGMRES"),
            contract("adjoints", "TestImplicit"),
        ),
        (
            Mutation("w = guess - a(guess)", "w = guess + a(guess)"),
            Mutation("b - share * unit", "b + share * unit"),
            Mutation("factor = share / size", "factor = share"),
            Mutation("torch.where(useful, u, 0.0)", "u"),
            Mutation("times_power_of_two(b, -exponent)", "times_power_of_two(b, exponent)"),
            Mutation("exponent - half", "half"),
        ),
    ),
    Target(
        "core/loop",
        (
            "tests/core/test_iteration_loop.py",
            "tests/core/test_compaction.py",
            contract("solvers", "TestPicard"),
        ),
        (
            Mutation(
                "return choose_rows(self.frozen[0], z, self.frozen[1], self.fused)", "return z"
            ),
            Mutation("step == max_steps:", "False:"),
            Mutation("Iterate(*(tensor[rows] for tensor in current))", "current"),
            Mutation("termination.select(termination_state, rows)", "termination_state"),
            Mutation("ledger.origin, posed.num_evals", "rows, posed.num_evals"),
            Mutation("problem.num_evals = posed.num_evals", "pass"),
            Mutation("measured = wide\n", "pass\n"),
            Mutation("posed.check_part(current)", "pass"),
        ),
    ),
    Target(
        "core/ledger",
        (
            "tests/core/test_iteration_loop.py",
            "tests/core/test_compaction.py",
            "tests/core/test_ledger.py",
            contract("solvers", "TestPicard"),
        ),
        (
            Mutation(
                "measured.residual < self.measurement.residual",
                "measured.residual > self.measurement.residual",
            ),
            Mutation("| (codes == Status.SUCCESS)", ""),
            Mutation("(worth & (codes != Status.DIVERGED))", "worth"),
            Mutation("torch.where(finished, step, self", "torch.where(finished, step + 1, self"),
            Mutation(
                "(measured.residual), codes, Status.NONFINITE", "(measured.residual), codes, 3"
            ),
            Mutation("self._finish(active & (codes != RUNNING)", "self._finish((codes != RUNNING)"),
            Mutation("choose(finite, current, self._first)", "current"),
            Mutation("self._archive.origin = self._archive.origin[rows]", "pass"),
            Mutation("whole[self.origin] = part", "whole[: len(part)] = part"),
        ),
    ),
    Target(
        "core/waypoints",
        ("tests/core/test_intermediate_states.py",),
        (
            Mutation(
                "[z for step, z in self._states.items() if step < num_steps]",
                "[z for step, z in self._states.items()]",
            ),
        ),
    ),
    Target(
        "core/scope",
        ("tests/core/test_scope.py", "tests/core/test_compaction.py"),
        (
            Mutation("key = (key, rows)", "pass"),
            Mutation("whole[self._samples]", "whole[: len(self._samples)]"),
            Mutation("if rows != len(self._samples)", "if False"),
        ),
    ),
    Target(
        "kernels/small_systems_numba",
        ("tests/kernels/test_cpu.py", "tests/solvers/test_broyden.py"),
        (
            Mutation("by_test[j] - image_by_test[j]", "by_test[j] + image_by_test[j]"),
            Mutation("by_test[j] - test_by_image[j]", "by_test[j] - image_by_test[j]"),
            Mutation("unit[i, i, lane] += ridge", "pass"),
            Mutation(
                "(1.0 if first else -1.0)\n                total", "1.0\n                total"
            ),
            Mutation("min_angle * lower[i, i, lane] <= 1.0", "0.0 * lower[i, i, lane] <= 1.0"),
            Mutation("order[i] = (slot - i) % n", "order[i] = i"),
            Mutation("inverse[i, m] = -factor", "inverse[i, m] = factor"),
            Mutation("born[b, i] <= born[b, j]", "born[b, i] >= born[b, j]"),
            Mutation("row[j] -= factor * upper[j]", "row[j] += factor * upper[j]"),
        ),
    ),
    Target(
        "kernels/passes_numba",
        ("tests/kernels/test_cpu.py",),
        (
            Mutation("test_by_image += test[i]", "test_by_image += image[i]"),
            Mutation("if rows[b]:", "if True:"),
            Mutation("target[i] += weight * image[i]", "target[i] -= weight * image[i]"),
            Mutation("(one - c) * here[i]", "c * here[i]"),
            Mutation("residual[i] - (image_before[i]", "residual[i] + (image_before[i]"),
        ),
    ),
    Target(
        "kernels/gmres_numba",
        ("tests/kernels/test_cpu.py", "tests/linear/test_gmres.py"),
        (
            Mutation("(1.0 if j == k else 0.0) - coeff", "(1.0 if j == k else 0.0) + coeff"),
            Mutation("cosine * lower - sine * upper", "cosine * lower + sine * upper"),
            Mutation("-sine * before", "sine * before"),
            Mutation("there[i] += weight * vector[i]", "there[i] -= weight * vector[i]"),
            Mutation("spent[b, i] -= columns", "spent[b, i] += columns"),
            Mutation("useless = target[b] > 0 and", "useless = target[b] < 0 and"),
        ),
    ),
    Target(
        "kernels/bookkeeping_numba",
        (
            "tests/kernels/test_cpu.py",
            "tests/core/test_ledger.py",
            "tests/terminations/test_giving_up.py",
        ),
        (
            Mutation("difference * difference", "difference"),
            Mutation("residual[b] <= size[b] and", ""),
            Mutation("f * shrink * shrink", "f"),
            Mutation("better or code == SUCCESS", "better"),
            Mutation("status[b], num_steps[b] = code, step", "status[b] = code"),
            Mutation("and code != DIVERGED", ""),
        ),
    ),
)


def find(text: str, mutation: Mutation) -> int | None:
    """Where the mutation applies, or None if it does not fit."""
    places = [i for i in range(len(text)) if text.startswith(mutation.old, i)]
    if mutation.nth == 0:
        return places[0] if len(places) == 1 else None
    return places[mutation.nth - 1] if mutation.nth <= len(places) else None


@contextmanager
def copy_of_tree() -> Iterator[Path]:
    """A temporary folder with src, tests and the settings of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__", "*.orig")
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        yield copy


def first_failure(copy: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails in the copy, None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", *tests]
    command += ["-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end within {TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    if done.returncode in (4, 5):  # pytest was called wrongly, or found no tests
        raise SystemExit(f"pytest could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return f"a crash (exit status {done.returncode})"


def check(target: Target, mutations: tuple[Mutation, ...]) -> tuple[int, int]:
    """Try the mutations of one file; return how many survived and how many no longer fit."""
    num_survivors = num_misfits = 0
    with copy_of_tree() as copy:
        file = copy / "src" / "equilibria" / f"{target.file}.py"
        original = file.read_text(encoding="utf-8")
        if failure := first_failure(copy, target.tests):
            raise SystemExit(f"{target.file}: {failure} fails before anything is broken")
        for mutation in mutations:
            place = find(original, mutation)
            label = f"{target.file}: {mutation.old!r} -> {mutation.new!r}"
            if place is None:
                num_misfits += 1
                print(f"MISFIT    {label}", flush=True)
                continue
            end = place + len(mutation.old)
            file.write_text(original[:place] + mutation.new + original[end:], encoding="utf-8")
            start = time.perf_counter()
            failure = first_failure(copy, target.tests)
            num_survivors += failure is None
            seconds = f"({time.perf_counter() - start:.0f} s)"
            word = "SURVIVED" if failure is None else "noticed "
            print(f"{word}  {label}  by {failure} {seconds}", flush=True)
        file.write_text(original, encoding="utf-8")
    return num_survivors, num_misfits


def main() -> int:
    """Run from the command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="such as solvers/anderson; all by default")
    parser.add_argument("--num-per-file", type=int, default=None, help="only the first so many")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    arguments = parser.parse_args()
    unknown = set(arguments.files) - {target.file for target in TARGETS}
    if unknown:
        known = ", ".join(target.file for target in TARGETS)
        parser.error(f"no mutations for {sorted(unknown)}; there are: {known}")
    num_survivors = num_misfits = num_tried = 0
    for target in TARGETS:
        if arguments.files and target.file not in arguments.files:
            continue
        mutations = target.mutations[: arguments.num_per_file]
        if arguments.list:
            for mutation in mutations:
                print(f"{target.file}: {mutation.old!r} -> {mutation.new!r}")
            continue
        survivors, misfits = check(target, mutations) if mutations else (0, 0)
        num_tried += len(mutations)
        num_survivors += survivors
        num_misfits += misfits
    if not arguments.list:
        print(f"{num_tried} mutations, {num_survivors} survived, {num_misfits} no longer fit")
    return 1 if num_survivors else 2 if num_misfits else 0


if __name__ == "__main__":
    sys.exit(main())
