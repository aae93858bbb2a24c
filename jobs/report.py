"""Write the report of a matrix: one page with every table and figure, and the files behind it. It trains nothing.

What is not finished is named on the page; the exit code is 1 where a stage of the report itself failed.
"""

import sys

from coda_ray.config import Address, Config, parse_job, told_in_one_line


class ReportJob(Config):
    """Configuration of jobs/report.py: that of the matrix."""

    out: Address | None = None
    """Folder or `s3://` address (reached as results are) for the files; unset: report/<job key> in the results."""


def main() -> int:
    """Run the job."""
    job = parse_job(ReportJob, prog="jobs/report.py", description=__doc__ or "")
    from coda_ray.pipeline.gather import write_report
    from coda_ray.storage import open_place

    out = open_place(job.results.model_copy(update={"address": job.out})) if job.out else None
    with told_in_one_line("jobs/report.py"):
        written = write_report(job, out, lambda line: print(line, flush=True))
    print(f"{written.files} files{'' if written.fresh else ', there already'}: {written.address}")
    return int(written.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
