"""Job `profile`: one step of an arm under torch.profiler; the kernels that take most of it, and the time that none runs."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from peft_caft.basics.tables import markdown_table

from .measuring import Job
from .models import ARMS, MODELS, TINY, Stepper, random_batch, random_model

SHOWN = 15


def main() -> None:
    names = [arm.name for arm in ARMS]
    job = Job.begin(
        "profile",
        __doc__,
        model={"choices": list(MODELS), "default": "Llama-2 7B"},
        arm={"choices": names, "default": "CAFT, decoder layer"},
        rows={"type": int, "default": 4, "help": "of 2,048 tokens"},
    )
    options = job.options
    config, rows, tokens = (TINY, 2, 32) if job.smoke else (MODELS[options.model], options.rows, 2048)
    arm = ARMS[names.index(options.arm)]
    batch = random_batch(config, rows, tokens, job.device)
    stepper = Stepper(arm, random_model(config, job.device, arm.trained), {}, batch)
    stepper.prepare()
    for _ in range(2):
        stepper()
    activities = [ProfilerActivity.CPU] if job.smoke else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as found:
        stepper()
    found.export_chrome_trace(str(job.out / "profile.trace.json.gz"))
    job.report(f"{options.arm} on {options.model}, {rows} x {tokens} tokens\n\n{table(found, job.smoke)}")


def table(found: profile, on_cpu: bool) -> str:
    """Operations by the time that their kernels take, with their number and their share of the step; at last the idle time."""
    kind = "cpu" if on_cpu else "device"
    # The card's own spans: operations of the host hold the time of their kernels too, annotations that of everything within.
    averages = [
        e for e in found.key_averages() if on_cpu or (e.device_type.name == "CUDA" and not e.is_user_annotation)
    ]
    events = [(getattr(e, f"self_{kind}_time_total"), e.count, e.key) for e in averages]
    kernels = sorted(((time, count, key) for time, count, key in events if time), reverse=True)
    busy = sum(time for time, _, _ in kernels)
    rows = [
        [key[:90], f"{count:,}", f"{time / 1000:.2f}", f"{time / busy:.1%}"] for time, count, key in kernels[:SHOWN]
    ]
    text = markdown_table(["kernel or operation", "calls", "ms", "share"], rows)
    if on_cpu:
        return text
    kernels_run = [e for e in found.events() if e.device_type.name == "CUDA" and not e.is_user_annotation]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels_run)
    idle, gaps, end = 0.0, [], spans[0][1]
    for start, stop in spans:
        if start > end:
            idle += start - end
            gaps.append(start - end)
        end = max(end, stop)
    largest = ", ".join(f"{gap / 1000:.2f}" for gap in sorted(gaps, reverse=True)[:5])
    return f"{text}\n\nThe card is idle for {idle / 1000:.2f} of {(end - spans[0][0]) / 1000:.2f} ms; the longest gaps: {largest} ms."


if __name__ == "__main__":
    main()
