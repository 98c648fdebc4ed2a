"""Name the question file of an evaluation: its SHA-256 and, for MMAU's test-mini, the published version.

MMAU's test-mini is not one file. Since 2024-10-23, github.com/Sakshi113/MMAU has published seventeen, with other
questions, answers and ids. Scores on different files are not comparable, so every evaluation records its file.
"""

import hashlib

from evaluation.predictions import saved_settings
from evaluation.scores import visible

# SHA-256 of mmau-test-mini.json -> date, and how many of its 1,000 answers are not literally among their choices
VERSIONS = {
    "9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c": ("2025-08-09", 0),
    "3940399a013d5f6d528ad4f5d1701cce29cdb5b19ccd4e6ab2800e0665dd6ac9": ("2025-06-23", 0),
    "5c63fe8f2de12e848be146e48436567c2022fe84ea0012da560003c30a24b2b7": ("2025-06-23", 0),
    "0bbabee60dcbd76815948394ac2dd31c41d18ab1215fe6fd6f93e0e510f78d7a": ("2025-05-30", 0),
    "e0042de8b99492539b0a17997b6c12fff90a6d42a47ad5fd8801c80dcb52b405": ("2025-05-24", 0),
    "157f1968a686c9e7ffb3669e13296349af72afe78af19c049e5d459ccb59d402": ("2025-05-22", 0),
    "cc59d9e3fad1a675f311f341b53b05079b94e735e5bc8992ac881ebeda2976f5": ("2025-05-19", 0),
    "cafecebbb4e48b9eb83fd88916911a853245379812e08f118984510340b2dc5b": ("2025-05-18", 0),
    "ea9f3f53085a2dfcf9ea7f5b2fca76a6634cd212af084bbb4cd8bf22c8903537": ("2025-05-16", 146),
    "9da96f00e43890adfbac3628b7b0dab3a32a6d6ec2d0a800b892ee261d35b818": ("2025-05-16", 146),
    "d35ec10bc3097fc605661b0eed00a487da74a6e7d9e23736567312c632347400": ("2025-05-15", 147),
    "e8cc09223b497191781756212cb616315690aaa6ea7ac359db1b65d97d1e2433": ("2025-03-25", 0),
    "ed2fd6b6c24ebec1a5a496de5d767e7ebfe79556044d8f0d8bd00ad0cf02d623": ("2025-01-28", 0),
    "850c2794664d53c1f7e7e2bcf35744b9ab4e60debad2156d67efd6956220affa": ("2024-12-09", 0),
    "1b6d31d0b70c2944a064a5de0147435427af0bcd3167eff175daa8bd5321e9d3": ("2024-10-29", 0),
    "a5006730ccb3fbf1fc72016774413b9b4a596bb00ce8f37796d9d30979b46192": ("2024-10-25", 0),
    "bef649e4bdeb436779a929ccdb9caa3f5144899bd087fc05e23065268ba888cc": ("2024-10-23", 0),
}


def identify_file(path: str, records: list[dict]) -> dict[str, str]:
    """Return a question file's `sha256` and, if its records are MMAU's, its `version`.

    records: of the file. MMAU's have the field audio_id. A file that differs from a published one in a single byte, for
    example in a line end, is not a published version. A predictions file is not one either.
    """
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 in VERSIONS:
        date, odd = VERSIONS[sha256]
        version = f"MMAU test-mini of {date}" + (f" ({odd} answers are not among their choices)" if odd else "")
        return {"sha256": sha256, "version": version}
    if any("audio_id" in record for record in records):
        return {"sha256": sha256, "version": "not a published version of MMAU test-mini"}
    return {"sha256": sha256}


def describe(file: dict, digits: int = 64) -> str:
    """Format the result of identify_file: the first `digits` digits of the hash, and the version if there is one."""
    version = f", {file['version']}" if "version" in file else ""
    return visible(f"sha256 {str(file.get('sha256'))[:digits]}{version}")


def name_files(predictions: dict[str, str]) -> list[str]:
    """Return a line that names the question file of predictions files, or warns if their questions or clips differ.

    predictions: name -> path of a predictions file. Returns no line if the settings of one of these files are missing,
    or if an earlier version of this code wrote them: they do not name the question file.
    """
    names: dict[str, list[str]] = {}  # question file -> names of its predictions files
    contents = set()  # hashes of records and clips
    for name, path in predictions.items():
        saved = saved_settings(path)
        file = saved.get("question_file")
        if not isinstance(file, dict):
            return []
        names.setdefault(describe(file, digits=12), []).append(name)
        contents.add(str(saved.get("questions", path)))
    if len(names) <= 1:
        return [f"question file: {text}" for text in names]
    listed = "; ".join(f"{', '.join(group)}: {text}" for text, group in names.items())
    if len(contents) == 1:
        return [f"question files: {listed}. Their questions and clips are the same"]
    return [
        f"warning: different question files: {listed}. Scores are comparable only if questions, choices, answers and "
        "clips are the same"
    ]
