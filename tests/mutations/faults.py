"""The faults: in which file, which text becomes which, and the tests that are to notice.

A text must stand once in the file; where a file was renamed, once in all of them. Tests are files under tests/, with
what pytest's -k selects of them after a space.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _fault(file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(file, old, new, tests)


CONFIG = [
    _fault(
        "megabus/config/stages.py",
        "if tp * pp * dp != world_size:",
        "if tp * pp * dp > world_size:",
        "config/test_config.py misfits",
    ),
    _fault(
        "megabus/config/stages.py",
        "if longest % stage.seq_len:",
        "if stage.seq_len % longest:",
        "config/test_config.py misfits",
    ),
    _fault("megabus/config/stages.py", "lr=stage.lr or last.lr,", "lr=last.lr,", "config/test_config.py stage"),
    _fault(
        "megabus/config/stages.py",
        "return self.global_batch_size // (self.micro_batch_size * self.layout.dp)",
        "return self.global_batch_size // self.micro_batch_size",
        "config/test_config.py",
        "train/test_schedule.py batches",
    ),
    _fault(
        "megabus/config/fractions.py",
        "return min(whole, max(unit, least, rounded))",
        "return min(whole, max(unit, rounded))",
        "kappa/test_planner.py fractions",
    ),
    _fault(
        "megabus/config/load.py",
        "if above and _at(tree, key) != yaml_value(text):",
        "if above and _at(tree, key) == yaml_value(text):",
        "config/test_config_read.py section",
    ),
]

DATA = [
    _fault(
        "megabus/data/batches.py",
        "samples[:, 1:].contiguous()",
        "samples[:, :-1].contiguous()",
        "data/test_data.py shift",
    ),
    _fault(
        "megabus/data/batches.py",
        "consumed_tokens + row * seq_len, seq_len)",
        "consumed_tokens + row, seq_len)",
        "data/test_data.py 'batch or stream'",
    ),
    _fault(
        "megabus/data/batches.py",
        "sample_T.max() >= self.vocab_size:",
        "sample_T.max() > self.vocab_size:",
        "data/test_data.py ids_outside",
    ),
    _fault(
        "megabus/data/order.py",
        "return (self.n_tokens - 1) // self.chunk_len",
        "return self.n_tokens // self.chunk_len",
        "data/test_data.py 'chunk or epoch'",
    ),
    _fault(
        "megabus/data/order.py",
        "return -(-position // seq_len) * seq_len",
        "return position // seq_len * seq_len",
        "data/test_data.py align",
    ),
    _fault(
        "megabus/data/order.py",
        "k, period * self.counts[k] + self._rank[slot]",
        "k, period * self.counts[k]",
        "data/test_data.py blend",
    ),
    _fault("megabus/data/order.py", "^ (epoch & MASK_64))", ")", "data/test_data.py 'permut or epoch'"),
    _fault(
        "megabus/data/indexed.py",
        "        _flush_to_disk(self._bin)\n",
        "",
        "data/test_data.py",
        "data/test_preprocess.py",
    ),
    _fault(
        "megabus/data/indexed.py", "if found != expected:", "if found < expected:", "data/test_data.py 'damage or size'"
    ),
]

KAPPA = [
    _fault(
        "megabus/kappa/monitor.py",
        "target = mp + (1 - span.kappa) * (start - mp)",
        "target = mp + span.kappa * (start - mp)",
        "kappa/test_kappa.py triggers",
    ),
    _fault(
        "megabus/kappa/monitor.py",
        "state.met + 1 if finite and self._met(view) else 0",
        "state.met + 1 if finite and self._met(view) else state.met",
        "kappa/test_kappa.py patience",
    ),
    _fault(
        "megabus/kappa/monitor.py",
        "if finite and enough and not only_cap:",
        "if finite and enough:",
        "kappa/test_kappa.py cap",
    ),
    _fault("megabus/kappa/monitor.py", "tokens >= max_tokens)", "tokens > max_tokens)", "kappa/test_kappa.py caps"),
    _fault(
        "megabus/kappa/predictors.py",
        "self.B * budget[0] ** -self.beta",
        "self.B * budget[0] ** -self.alpha",
        "kappa/test_kappa.py scaling_law",
    ),
    _fault(
        "megabus/kappa/law_fit.py",
        "squares / (len(rows) - len(NAMES))",
        "squares / len(rows)",
        "kappa/test_planner.py residuals",
    ),
]

KERNELS = [
    _fault(
        "megabus/kernels/eager.py",
        "a * sin_TC + b * cos_TC",
        "a * sin_TC - b * cos_TC",
        "kernels/test_kernels.py 'values and triton and rotate'",
        "model/test_model.py reference",
    ),
    _fault(
        "megabus/kernels/eager.py",
        "return (u * F.silu(v)).to(u_NF.dtype)",
        "return (v * F.silu(u)).to(u_NF.dtype)",
        "model/test_model.py reference",
    ),
    _fault(
        "megabus/kernels/eager.py",
        "unit(h + alpha_D * (unit(x_ND) - h))",
        "unit(h + alpha_D * unit(x_ND))",
        "model/test_model.py reference",
    ),
    _fault(
        "megabus/kernels/compiled.py",
        "dynamic=True, fullgraph=True",
        "dynamic=False, fullgraph=True",
        "kernels/test_kernels.py coincide",
    ),
    _fault(
        "megabus/kernels/table.py",
        "1 << (max(length, 1) - 1).bit_length()",
        "1 << max(length, 1).bit_length()",
        "kernels/test_kernels.py refuses",
        "train/test_train.py kernels",
    ),
]

MODEL = [
    _fault(
        "megabus/model/ngpt.py",
        "scale=sqrt(model.head_dim))",
        "scale=1 / sqrt(model.head_dim))",
        "model/test_model.py reference",
    ),
    _fault(
        "megabus/model/ngpt.py",
        "(wide(self.s_qk) * self.root_d).square()",
        "(wide(self.s_qk) * self.root_d)",
        "model/test_model.py reference",
    ),
    _fault(
        "megabus/model/layers.py",
        "dtype=torch.bool, device=h_BTD.device).tril(start)",
        "dtype=torch.bool, device=h_BTD.device).tril(start + 1)",
        "model/test_generate.py cache",
    ),
    _fault(
        "megabus/model/layers.py",
        "h_BTD * here_BT[..., None]",
        "h_BTD",
        "parallel/test_parallel.py 'layout_equals and TP2'",
    ),
    _fault(
        "megabus/model/loss.py",
        "counts = targets != IGNORED",
        "counts = targets == targets",
        "model/test_loss.py logits",
    ),
    _fault("megabus/model/loss.py", "grad_w += narrow.T @ h", "grad_w = narrow.T @ h", "model/test_loss.py logits"),
    _fault(
        "megabus/model/loss.py",
        "top = tp.max(logits.amax(-1))",
        "top = logits.amax(-1)",
        "parallel/test_parallel.py 'layout_equals and TP2'",
    ),
    _fault(
        "megabus/model/params.py",
        "return rank * n // tp, (rank + 1) * n // tp",
        "return rank * (n // tp), (rank + 1) * (n // tp)",
        "model/test_model.py shard",
        "parallel/test_placement.py",
    ),
    _fault(
        "megabus/model/init.py",
        "        start += len(block)\n",
        "",
        "model/test_model.py 'initial or differ or rows'",
        "train/test_train.py caps_alone",
    ),
]

PARALLEL = [
    _fault(
        "megabus/parallel/tensor_parallel.py",
        "return ctx.tp.sum(grads[0].clone()), None",
        "return grads[0].clone(), None",
        "parallel/test_parallel.py 'layout_equals and TP2'",
    ),
    _fault(
        "megabus/parallel/tensor_parallel.py",
        "return ctx.tp.sum(grads[0].clone()), None",
        "return ctx.tp.sum(grads[0]), None",
        "parallel/test_parallel.py backward",
    ),
    _fault(
        "megabus/parallel/tensor_parallel.py",
        "return _Enter.apply(parameter, self) if self.sequence_parallel else parameter",
        "return parameter",
        "parallel/test_sequence_parallel.py one_process",
    ),
    _fault(
        "megabus/parallel/tensor_parallel.py",
        "return parts.transpose(0, 1).flatten(1, 2)",
        "return parts.flatten(0, 1).unflatten(0, (-1, self.size)).flatten(1, 2)",
        "parallel/test_sequence_parallel.py one_process",
    ),
    _fault(
        "megabus/parallel/topology.py",
        "rank // layout.tp % layout.dp, rank % layout.tp)",
        "rank % layout.dp, rank // layout.dp % layout.tp)",
        "parallel/test_placement.py coordinates",
    ),
    _fault(
        "megabus/parallel/placement.py",
        "return -(-entries // (ZERO_ALIGNMENT * self.layout.dp)) * ZERO_ALIGNMENT",
        "return -(-entries // self.layout.dp)",
        "parallel/test_placement.py zero",
    ),
    _fault(
        "megabus/parallel/placement.py",
        "range(((first + 1) * tp - 1) // n, ((last + 1) * tp - 1) // n + 1)",
        "range(first * tp // n, last * tp // n + 1)",
        "parallel/test_placement.py",
    ),
    _fault(
        "megabus/parallel/agree.py",
        "dist.all_reduce(tensor, op=dist.ReduceOp.MAX)",
        "dist.all_reduce(tensor, op=dist.ReduceOp.MIN)",
        "train/test_stop.py one_rank",
    ),
]

ENGINE = [
    _fault(
        "megabus/engine/unit_rows.py",
        "        dist.all_reduce(squares, group=self.dp_group)\n",
        "",
        "engine/test_unit_rows.py",
    ),
    _fault(
        "megabus/engine/unit_rows.py",
        "head = min(-start % width, stop - start)",
        "head = min(start % width, stop - start)",
        "engine/test_unit_rows.py",
    ),
    _fault(
        "megabus/engine/engine.py",
        "return loss / self.stage.layout.dp",
        "return loss",
        "parallel/test_parallel.py 'layout_equals and DP2'",
    ),
    _fault(
        "megabus/engine/engine.py",
        "loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)",
        "loss",
        "train/test_faults.py number",
    ),
    _fault(
        "megabus/engine/engine.py",
        "first = (micro_step * self.stage.layout.dp + at) * size",
        "first = (micro_step + at) * size",
        "parallel/test_parallel.py 'layout_equals and DP2'",
    ),
    _fault(
        "megabus/engine/fragments.py",
        "start = placement.shard(spec.name, rank).start + mapping",
        "start = mapping",
        "parallel/test_parallel.py 'layout_equals and TP2'",
    ),
]

GROWTH = [
    _fault(
        "megabus/growth/maps.py",
        "parent = np.arange(new) * old // new",
        "parent = np.arange(new) % old",
        "growth/test_growth.py spread",
    ),
    _fault(
        "megabus/growth/maps.py",
        "return embed.copies**-0.5",
        "return embed.copies**-1.0",
        "growth/test_growth.py isometry",
    ),
    _fault(
        "megabus/growth/maps.py",
        "return 1.0 if self.copy == 0 else 0.0",
        "return 1.0",
        "growth/test_growth_exact.py function",
        "growth/test_growth.py",
    ),
    _fault(
        "megabus/growth/reads.py",
        "return cos * w_BD + (1 - cos**2) ** 0.5 * c_BD",
        "return cos * w_BD + (1 - cos) * c_BD",
        "growth/test_growth_reads.py",
    ),
    _fault(
        "megabus/growth/reads.py",
        "counter.unit_rows(c_BD - scale * inside_BD[:, parent])",
        "counter.unit_rows(c_BD)",
        "growth/test_growth_reads.py",
    ),
    _fault(
        "megabus/growth/writes.py",
        "length_B1 * ((1 - copies**-2) ** 0.5 * t_BD)",
        "length_B1 * ((1 - copies**-1) ** 0.5 * t_BD)",
        "growth/test_growth_exact.py",
        "growth/test_growth.py",
    ),
    _fault(
        "megabus/growth/redistribute.py",
        "into[low - piece.start : high - piece.start] = values[low - start : high - start]",
        "into[: high - low] = values[low - start : high - start]",
        "growth/test_redistribute.py shards_of",
    ),
    _fault(
        "megabus/growth/plan.py",
        "cuts = start[1:] > reach[:-1]",
        "cuts = start[1:] >= reach[:-1]",
        "growth/test_plan.py",
    ),
    _fault(
        "megabus/growth/planner.py",
        "self.flops(loss) / (self.law.beta * above)",
        "self.flops(loss) / above",
        "kappa/test_planner.py law",
    ),
]

CHECKPOINT = [
    _fault(
        "megabus/checkpoint/manifest.py",
        "    sync(path)\n",
        "",
        "checkpoint/test_checkpoint_store.py durable",
    ),
    _fault(
        "megabus/checkpoint/manifest.py",
        "if digest != entry.sha256:",
        "if len(digest) != len(entry.sha256):",
        "checkpoint/test_checkpoint_damage.py plain_process",
    ),
    _fault(
        "megabus/checkpoint/store.py",
        "older = complete(root)[keep_last:]",
        "older = complete(root)[keep_last + 1 :]",
        "checkpoint/test_checkpoint_store.py prune",
    ),
    _fault(
        "megabus/checkpoint/store.py",
        "    sync(folder.parent)\n    point_latest(folder)\n",
        "    point_latest(folder)\n",
        "checkpoint/test_checkpoint_store.py durable",
    ),
    _fault(
        "megabus/checkpoint/save.py",
        'values.to("cpu", copy=True)',
        'values.to("cpu")',
        "checkpoint/test_checkpoint_save.py moment",
    ),
    _fault(
        "megabus/checkpoint/store.py",
        "key=lambda p: step_of(p) or 0, reverse=True)",
        "key=lambda p: p.name, reverse=True)",
        "checkpoint/test_checkpoint_store.py largest",
    ),
]

CONVERT = [
    _fault(
        "megabus/convert/hugging_face.py",
        '"rms_norm_eps": model.norm_eps / model.d_model',
        '"rms_norm_eps": model.norm_eps',
        "convert/test_hugging_face.py 'logits or llama'",
    ),
    _fault(
        "megabus/convert/source.py",
        "[part.start - chunk.start : part.stop - chunk.start]",
        "[: part.stop - part.start]",
        "convert/test_convert.py checkpoint_of",
    ),
    _fault(
        "megabus/convert/hugging_face.py",
        "shape[::-1] if transposed(spec, self.state.model) else shape",
        "shape",
        "convert/test_hugging_face.py llama",
    ),
]

ESTIMATE = [
    _fault(
        "megabus/estimate/memory.py",
        "moments=2 * FP32 * owned,",
        "moments=FP32 * owned,",
        "estimate/test_estimate.py 'ranks_hold or large'",
    ),
    _fault(
        "megabus/estimate/step_time.py",
        "link.seconds(n_bytes * steps / ranks, steps)",
        "link.seconds(n_bytes, steps)",
        "estimate/test_estimate.py ring",
    ),
    _fault(
        "megabus/estimate/memory.py",
        "return min(layout_pp - pp, grad_accum)",
        "return min(layout_pp, grad_accum)",
        "estimate/test_estimate.py ranks_hold",
    ),
]

PREFLIGHT = [
    _fault(
        "megabus/preflight/machine.py", "if need > free:", "if need > 2 * free:", "preflight/test_preflight.py memory"
    ),
    _fault(
        "megabus/preflight/machine.py",
        "(machine.host, rank) if machine.on_gpu else machine.host",
        "machine.host",
        "preflight/test_preflight.py share",
    ),
    _fault(
        "megabus/preflight/slow.py",
        "sorted(values)[len(values) * 3 // 4]",
        "sorted(values)[len(values) // 4]",
        "preflight/test_preflight.py slow",
    ),
]

TRAIN = [
    _fault(
        "megabus/train/schedule.py",
        "(1 - low) * (1 - share) / optim.decay_share",
        "(1 - low) * (1 - share)",
        "train/test_schedule.py",
    ),
    _fault(
        "megabus/train/schedule.py",
        "return min(1.0, max(used / budget",
        "return min(1.0, min(used / budget",
        "train/test_schedule.py largest",
    ),
    _fault(
        "megabus/train/loop.py",
        "now.position = align_up(now.position, new.seq_len)",
        "now.position = now.position + new.seq_len",
        "train/test_train.py layout",
    ),
    _fault(
        "megabus/train/loop.py",
        "unsound = run.progress.nonfinite_in_a_row > run.config.faults.max_skips",
        "unsound = run.progress.nonfinite > run.config.faults.max_skips",
        "train/test_faults.py add_up",
    ),
    _fault(
        "megabus/train/metrics.py",
        'return path.read_bytes().rfind(b"\\n") + 1',
        "return len(path.read_bytes())",
        "train/test_metrics_full_disk.py whole",
    ),
    _fault(
        "megabus/train/stop.py",
        "        self.file.unlink(missing_ok=True)\n",
        "        pass\n",
        "train/test_stop.py file",
    ),
    _fault(
        "megabus/train/resume.py",
        'if changes and config.resume == "strict":',
        'if not changes and config.resume == "strict":',
        "train/test_resume_config.py mathematics",
    ),
    _fault(
        "megabus/train/watchdog.py",
        "if not self._beat.wait(self.timeout):",
        "if self._beat.wait(self.timeout):",
        "train/test_watchdog.py quiet",
    ),
]

REPORT = [
    _fault(
        "megabus/train/history.py",
        'earlier["step"] <= row["step"]',
        'earlier["step"] < row["step"]',
        "report/test_plots.py resume",
    ),
    _fault("megabus/train/history.py", '.split("\\n")[:-1]', '.split("\\n")', "report/test_plots.py written"),
]

NLI = [
    _fault(
        "megabus/nli/metrics.py",
        "predicted, gold = matrix.sum(-2), matrix.sum(-1)",
        "predicted, gold = matrix.sum(-1), matrix.sum(-2)",
        "nli/test_nli_data.py metrics",
    ),
    _fault(
        "megabus/nli/finetune.py", "return losses_BT.sum(1).mean()", "return losses_BT.mean()", "nli/test_nli.py learns"
    ),
    _fault(
        "megabus/nli/score.py",
        "tokens[n + 1 - scored.n_label :]",
        "tokens[n - scored.n_label : -1]",
        "nli/test_nli.py plain_process",
    ),
]

LAUNCHER = [
    _fault(
        "launcher/slurm/sweep.py",
        'if char == "," and not depth and not quote:',
        'if char == "," and not quote:',
        "launcher/test_sweep.py combinations",
    ),
    _fault(
        "launcher/slurm/render.py",
        "((days * 24 + hours) * 60 + minutes) * 60 + rest",
        "((days * 24 + hours) * 60 + minutes) * 60",
        "launcher/test_sweep.py limits",
    ),
    _fault(
        "launcher/slurm/render.py",
        '"arguments": shlex.join(job.arguments),',
        '"arguments": " ".join(job.arguments),',
        "launcher/test_slurm.py character",
    ),
    _fault(
        "megabus/command.py",
        "        time.sleep(PATIENCE)\n        return 2\n",
        "        return 2\n",
        "test_command.py",
    ),
]

FAULTS = [
    *(CONFIG + DATA + KAPPA + KERNELS + MODEL + PARALLEL + ENGINE + GROWTH + CHECKPOINT),
    *(CONVERT + ESTIMATE + PREFLIGHT + TRAIN + REPORT + NLI + LAUNCHER),
]
