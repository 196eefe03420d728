"""The word list: old names and phrases that the project no longer uses, each with what to write instead.

`python .ci/words.py FILE...` prints each place with one, and exits with status 1 if there is any.
"""

import re
import sys
from pathlib import Path

PHRASES = {
    r"gone on (from|with)|going? on from|goes on from|went on from": "resume",
    r"befits?\b": "suits, matches",
    r"\bwhoever\b": "the process, the user",
    r"\bhow many-th\b": "index, number",
    r"\banew\b": "again",
    r"where not given|if not given|when not given": "defaults to ...",
    r"\bdealt out\b": "assigned",
    r"what is true of": "name the property",
    r"\bis what (is|was|were|are)\b": "use the noun",
    r"\bunasked\b": "name the setting",
    r"what follows from it": "name the effect",
    r"\bwithout a word\b": "silently",
    r"\b(he|his|him) (is|was|has|below|above|process|rank)\b": "it",
}
NAMES = {
    r"waterfall": "funnel",
    r"\btopology\b": "cluster",
    r"\bheld_out\.(every|keep|metric|patience|samples|turns)\b": "validation.*",
    r"\btoo_long\b": "overflow",
    r"\bkeep_states\b": "save_total_limit",
    r"\bsave_every\b": "save_steps",
    r"\bworst_first\b": "largest batch first",
    r"\bprocesses_per_node\b": "gpus_per_node",
    r"\bleading_turns_to_cut\b": "num_turns_to_truncate",
    r"\bobtain_tokenizer\b": "load_tokenizer",
    r"\b(HF|OpenAI)Policy\b": "Generator",
    r"\bexisting=": "if_exists=",
    r"\brefuse_leaks\b|\bguard_rows\b": "check_varlen_inputs, forbid_kv_cache",
    r"\b(tight_fit|best_fit)\.py\b": "bin_packing.py",
    r"\bdocument_attention\b": "varlen_attention",
    r"\bstrip_notices\b": "strip_boilerplate",
    r"\bat_equal_length\b": "length_controlled",
    r"\bwithout_flagged\b": "decontaminated",
    r"\bin_4_bits\b": "load_in_4bit",
    r"\bwhole_weights\b": "consolidated_weights",
    r"\boblongs?\b": "prefix_blocks",
    r"\bcells_of\b": "token_group_ids",
}
WORDS = [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in PHRASES.items()]
WORDS += [(re.compile(pattern), instead) for pattern, instead in NAMES.items()]


def find(path: Path) -> list[str]:
    """What is left of the list in a text file: `file:line: word: write X`."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        for pattern, instead in WORDS:
            if match := pattern.search(line):
                found.append(f"{path}:{number}: {match.group()!r}: write {instead}")
    return found


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    places = [place for file in files if file.resolve() != Path(__file__).resolve() for place in find(file)]
    print(*places, sep="\n", end="\n" if places else "")
    sys.exit(bool(places))
