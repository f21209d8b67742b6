"Answers RULER's prompts by reading them, as a perfect model would, and knows nothing else of them."
import re
from collections import Counter


def needles(text: str) -> list[str]:
    asked = r"special magic \w+ for ([^?.\n]+) mentioned in the provided text\?"
    query = re.findall(asked, text)[-1]
    keys = re.split(r", and |, ", query)
    told = re.findall(r"special magic \w+ for (\S+) is: (\S+)\.", text)
    return [value for asked in keys for key, value in told if key == asked]


def variables(text: str) -> list[str]:
    text = text.rpartition("hidden in the following text")[2]          # behind the example
    value = re.findall(r"assigned the value (\d+) in the text above", text)[-1]
    found = re.findall(rf"VAR (\w+) = {value}\b", text)
    assigned = re.findall(r"VAR (\w+) = VAR (\w+)", text)
    for name in found:                                                 # grows while it is read
        found += [later for later, before in assigned if before == name]
    return found


def common(text: str) -> list[str]:
    text = text.rpartition("Below is a numbered list")[2].partition("\nQuestion:")[0]
    return [word for word, _ in Counter(re.findall(r"\d+\. ([a-z-]+)", text)).most_common(10)]


def frequent(text: str) -> list[str]:
    text = text.partition("frequently appeared coded words.")[2].partition("\nQuestion:")[0]
    words = re.findall(r"\b[a-z]{6}\b", text)
    return [word for word, _ in Counter(words).most_common(3)]


PERSON = r"([A-Z]\w+ [A-Z]\w+)"
FRIEND = "the best friend of "


def documents(text: str) -> list[str]:
    friends = dict(re.findall(rf"best friend of {PERSON} was {PERSON}\.", text))
    owned = dict(re.findall(rf"{PERSON} owned a thing that nobody else had, the ([^.]+)\.", text))
    name = re.findall(r"What did (.+?) own\?", text)[-1]
    if name.startswith(FRIEND): name = friends[name.removeprefix(FRIEND)]
    return [owned[name]]


SOLVE = {"niah": needles, "vt": variables, "cwe": common, "fwe": frequent, "qa": documents}


def solve(text: str) -> str:
    "The answer to a prompt, from its text alone."
    if "special magic" in text: kind = "niah"
    elif "chain(s)" in text: kind = "vt"
    elif "numbered list" in text: kind = "cwe"
    else: kind = "fwe" if "coded words" in text else "qa"
    return " ".join(SOLVE[kind](text))
