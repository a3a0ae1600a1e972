"""The papers for a security review are true of the code: the tests they name exist, and so do their commands, files and figures.

    python tests/test_papers.py --write    counts the hostile tests anew, in docs/threat-model.md

The bill of materials (docs/sbom.cdx.json) is that of constraints.txt, and valid; `make sbom` writes it anew.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]  # as a script, Python puts tests/ there instead

import sbom  # noqa: E402  the lines above make these importable for the script
from test_docs import DOCUMENTS, PROGRAMS, command_names, command_of  # noqa: E402

from fl_server import consortium, gateway  # noqa: E402
from fl_server.settings import ServerFile  # noqa: E402
from privacy import calls, deidentify  # noqa: E402

THREATS = ROOT / "docs" / "threat-model.md"
PAPERS = (ROOT / "docs" / "security-review.md", ROOT / "SECURITY.md")
STATES = ("holds", "partly", "**not yet**", "outside")
NAMED = re.compile(r"`(tests/test_[a-z_]+\.py)(?:::(test_[a-z0-9_]+))?`")
BEGIN, END = "<!-- counted: begin -->\n", "<!-- counted: end -->\n"

CALLERS, GATE, SERVICE = (
    "tests/test_hostile_callers.py",
    "tests/test_hostile_gateway.py",
    "tests/test_hostile_service.py",
)
HOSTILE = {
    "certificates: unknown, ended, revoked, of another authority, over a stolen name; keys shown that are not theirs": (
        f"{CALLERS}::test_the_handshake_ends_for_a_stranger",
        f"{CALLERS}::test_a_certificate_of_our_authority_is_not_enough",
        f"{CALLERS}::test_the_key_shown_to_flower_is_the_key_of_the_certificate",
        f"{CALLERS}::test_the_key_has_to_be_shown",
        f"{CALLERS}::test_a_certificate_that_ends_while_its_connection_is_open_ends_the_connection",
        f"{CALLERS}::test_a_revoked_site_is_out_within_seconds_on_open_connections_too",
        f"{CALLERS}::test_a_new_key_takes_the_place_of_a_revoked_one_and_the_old_one_stays_out",
        "tests/test_privacy_keys.py::test_check_issued_refuses_what_the_authority_did_not_say",
        "tests/test_privacy_keys.py::test_hostile_signing_requests_are_refused",
        "tests/test_server_revocation.py",
    ),
    "older TLS, plaintext, other protocols": (
        f"{CALLERS}::test_plain_bytes_get_no_answer",
        f"{CALLERS}::test_no_session_is_resumed",
        f"{GATE}::test_another_protocol_is_malformed",
        f"{GATE}::test_http_2_is_not_agreed_upon",
        f"{SERVICE}::test_plain_bytes_get_no_answer",
        f"{SERVICE}::test_only_http_2_is_agreed_upon",
        f"{SERVICE}::test_broken_http_2_ends_its_own_connection_at_most",
        "tests/test_server_consortium.py::test_only_tls_13_is_spoken",
        "tests/test_deploy.py::test_plain_http_and_old_tls_are_refused",
    ),
    "Flower's other interfaces through the gateway; other spellings, smuggled headers and requests": (
        f"{GATE}::test_of_all_routes_of_flower_exactly_the_calls_of_a_node_pass",
        f"{GATE}::test_another_spelling_of_a_path_is_another_path",
        f"{GATE}::test_another_method_is_not_known",
        f"{GATE}::test_another_request_line_is_malformed",
        f"{GATE}::test_a_header_that_could_be_read_in_two_ways_is_malformed",
        f"{GATE}::test_a_length_is_a_plain_number",
        f"{GATE}::test_a_request_without_a_host_is_malformed",
        f"{GATE}::test_a_head_that_ends_otherwise_is_malformed_at_once",
        f"{GATE}::test_a_second_request_before_the_answer_ends_the_connection",
        f"{GATE}::test_a_truncated_request_leaves_nothing_behind",
        "tests/test_deploy.py::test_the_gateway_answers_404_to_all_but_the_fleet_calls_of_a_node",
    ),
    "too large, too slow, too many": (
        f"{CALLERS}::test_who_is_slow_is_not_waited_for",
        f"{CALLERS}::test_two_thousand_connections_that_say_nothing_do_not_keep_a_site_out",
        f"{CALLERS}::test_connections_of_one_site_are_bounded_and_leave_room_for_the_others",
        f"{GATE}::test_a_head_over_the_limit_is_refused",
        f"{GATE}::test_a_head_without_an_end_is_refused_at_the_limit",
        f"{GATE}::test_a_body_over_the_limit_is_refused_when_it_is_announced",
        f"{GATE}::test_a_body_of_unknown_length_is_refused",
        f"{GATE}::test_a_site_holds_no_more_than_one_largest_body_at_a_time",
        f"{SERVICE}::test_metadata_over_the_limit_are_refused",
        f"{SERVICE}::test_a_body_over_the_limit_is_refused",
        f"{SERVICE}::test_a_thousand_connections_that_say_nothing_do_not_keep_a_site_out",
        f"{SERVICE}::test_more_calls_at_once_than_are_taken_are_refused_and_not_queued",
        "tests/test_privacy_wire.py::test_more_than_a_message_may_hold_is_refused",
    ),
    "calls forged, changed, repeated, reordered, cut": (
        f"{SERVICE}::test_a_changed_request_is_not_what_was_signed",
        f"{SERVICE}::test_a_signature_that_was_turned_around_is_the_same_call",
        f"{SERVICE}::test_a_made_up_signature_is_none",
        f"{SERVICE}::test_calls_may_arrive_in_any_order_and_each_once",
        f"{SERVICE}::test_of_the_same_call_at_the_same_moment_one_counts",
        f"{SERVICE}::test_a_nonce_is_its_owners",
        f"{SERVICE}::test_no_method_but_enrol_is_open_without_a_signature",
        "tests/test_server_consortium.py::test_a_call_that_is_not_wholly_signed_is_refused",
        "tests/test_server_consortium.py::test_a_signature_holds_for_its_method_and_request_only",
        "tests/test_server_consortium.py::test_double_metadata_is_refused",
        "tests/test_server_consortium.py::test_another_key_cannot_speak_for_a_name",
        "tests/test_server_consortium.py::test_a_call_is_good_once",
    ),
    "joining with what is no invitation": (
        f"{SERVICE}::test_a_token_that_was_not_given_out_does_not_enrol",
        f"{SERVICE}::test_a_request_that_proves_no_key_of_ours_does_not_enrol",
        f"{SERVICE}::test_guessing_tokens_neither_succeeds_nor_writes_anything",
        "tests/test_server_roster.py::test_each_refusal_has_its_reason_and_changes_nothing",
        "tests/test_server_roster.py::test_of_many_at_once_one_redeems",
        "tests/test_offline_authority.py::test_a_list_of_anybody_else_is_not_signed",
        "tests/test_offline_authority.py::test_only_certificates_that_answer_a_request_are_taken_in",
    ),
    "a coordinator that orders what was not agreed to": ("tests/test_hostile_server.py", "tests/test_leaving.py"),
    "a coordinator or sites that attack masked sums": (
        "tests/test_hostile_sums.py",
        "tests/test_privacy_secagg_hostile.py",
    ),
    "code, pickles, a worker that was taken over": (
        "tests/test_papers.py::test_nothing_asks_for_code",
        "tests/test_client_worker.py::test_whatever_a_worker_sends_the_node_refuses_the_order_and_goes_on_with_another_worker",
        "tests/test_client_worker.py::test_a_worker_that_asks_for_another_signature_gets_none_and_is_replaced",
        "tests/test_client_sandbox.py::test_a_worker_is_refused_every_connection_and_program_and_still_trains",
        "tests/test_client_protection.py::test_the_node_signs_nothing_else_and_what_is_right_afterwards",
    ),
    "bombs and broken files: YAML, DICOM, pictures, records": (
        "tests/test_cli.py::test_a_mistake_in_a_study_is_named_with_its_line",
        "tests/test_models_study.py::test_files_that_cannot_be_documents_are_refused",
        "tests/test_client_ingest.py::test_what_is_left_out_has_a_name",
        "tests/test_client_ingest.py::test_a_copy_cut_anywhere_is_left_out_by_name",
        "tests/test_client_ingest.py::test_flipped_bytes_never_stop_the_run",
        "tests/test_client_ingest.py::test_links_out_of_the_folder_pipes_and_large_files_are_not_read",
        "tests/test_models_imaging.py::test_damage_has_a_name",
        "tests/test_privacy_wire.py::test_arbitrary_records_never_pass_and_never_crash",
    ),
    "names that are paths": (
        f"{SERVICE}::test_a_name_that_is_none_does_not_enrol",
        f"{SERVICE}::test_a_name_that_is_no_text_does_not_enrol",
        "tests/test_server_consortium.py::test_a_run_id_is_never_a_path",
        "tests/test_server_consortium.py::test_a_hostile_coordinator_writes_no_other_files",
        "tests/test_client_enrol.py::test_a_digest_from_outside_is_never_a_path",
    ),
    "records that were changed": (
        "tests/test_privacy_journal.py::test_the_first_damaged_line_is_named",
        "tests/test_privacy_journal.py::test_every_flipped_bit_is_found",
        "tests/test_privacy_ledger_damage.py",
    ),
    "values of patients on their way out": ("tests/test_leaks.py", "tests/test_privacy_deidentify.py"),
    "journals and their heads: forged, contradicting, cut off, made anew": (
        "tests/test_privacy_heads.py",
        "tests/test_privacy_forged.py",
    ),
    "approval and settings: rules against people, harmful site.yaml, redirects": (
        "tests/test_client_rules_hostile.py",
        "tests/test_client_node.py::test_a_gateway_cannot_send_the_node_elsewhere",
        "tests/test_client_policy.py::test_settings_that_are_wrong_or_a_bomb_are_refused",
    ),
    "images: mutated, cut, spliced, crashing or endless decoders, zips that lie or bomb, swapped files, header JSON": (
        "tests/test_hostile_files.py",
        "tests/test_client_readers.py",
        "tests/test_client_sources.py",
        "tests/test_client_series.py",
    ),
    "label tables: mutated CSV, XLSX, JSON; bombs, entities, nesting": (
        "tests/test_models_tables.py",
        "tests/test_models_connectors.py",
    ),
    "archives: other patients' studies, endless and malformed answers, redirects, slow drips": (
        "tests/test_client_fetch.py",
    ),
    "released models: cut, swapped, endless, older ones as newer, foreign, unsigned, names that are paths": (
        "tests/test_models_catalogue.py",
        "tests/test_models_registry.py",
    ),
    "questions that count: asked twice, altered, too fine; small cells": ("tests/test_counting.py",),
}
"""What was attacked -> the tests that do it: whole files, or single tests. No test is in two rows."""

DEV_ONLY = """
    ast-serialize boolean-py cyclonedx-python-lib defusedxml dicomweb-client execnet grpcio-tools hypothesis iniconfig jsonschema
    jsonschema-specifications librt license-expression mypy mypy-extensions packageurl-python pluggy psutil py-serializable py-spy
    pytest pytest-timeout pytest-xdist referencing retrying rpds-py ruff sortedcontainers types-protobuf types-psutil types-pyyaml
"""
"""The pins that nothing needs at run time, written down by hand: a new pin is one of these, or it belongs into the SBOM."""
EXTRA_ONLY = """
    googleapis-common-protos opentelemetry-api opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common
    opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http opentelemetry-proto opentelemetry-sdk
    opentelemetry-semantic-conventions
    flatbuffers ml-dtypes onnx onnx-ir onnxruntime onnxscript
    msgpack ray
"""
"""The pins of the extras `otel`, `onnx` and `ray`, which `make env` does not install and the bill of materials does not list."""


# The tests that the papers name --------------------------------------------------------------------------------------


def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing(named: list[tuple[str, str]]) -> list[str]:
    """Those of (file, function or "") that are not there."""
    lost = []
    for file, function in named:
        path = ROOT / file
        if not path.is_file() or (function and function not in functions_in(path)):
            lost.append(f"{file}::{function}")
    return lost


def rows() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(against, state, tests) of every row of the tables of threats."""
    text, found = THREATS.read_text(encoding="utf-8"), []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 4 and cells[2] not in ("state", "---"):
            found.append((cells[0], cells[2], NAMED.findall(cells[3])))
    return found


def test_every_row_of_the_threat_model_has_a_state_and_every_claim_its_tests() -> None:
    found = rows()
    tables = re.findall(r"^\| against \|", THREATS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(tables) >= 8 and len(found) > 5 * len(tables)
    for against, state, named in found:
        assert state in STATES, f"{against}: {state}"
        if state in ("holds", "partly"):
            assert named and all(function for _, function in named), f"{against}: names no test function"
            assert missing(named) == [], against
        if state == "**not yet**":
            # Once its tests are there, a row is to say that it holds.
            assert not [function for _, function in named if function], f"{against}: is there after all?"


def test_every_test_that_the_other_papers_name_exists() -> None:
    for page in [*PAPERS, *(ROOT / "docs").glob("*.md")]:
        if page != THREATS:
            assert missing(NAMED.findall(page.read_text(encoding="utf-8"))) == [], page.name


def test_nothing_asks_for_code() -> None:
    """No module of ours names a call of Flower that fetches, installs or loads a bundle, and the gateway passes none."""
    calls_for_code = re.compile(r"get_?fab|install_?from_?fab|load_app|load_client_app", re.IGNORECASE)
    for package in ("fl_client", "fl_server", "models", "privacy"):
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
            found = sorted(name for name in names if calls_for_code.fullmatch(name))
            assert found == [], f"{file.relative_to(ROOT)}: {found}"
    assert not {path for path in gateway.FLEET_PATHS if "fab" in path or "run" in path.rsplit("/", 1)[1]}


# Hostile tests, counted ----------------------------------------------------------------------------------------------


def collected() -> Counter[str]:
    """`file::function` -> number of its cases, marked ones too, of every file in HOSTILE."""
    files = sorted({name.split("::")[0] for names in HOSTILE.values() for name in names})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        *files,
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return Counter(line.split("[")[0] for line in ran.stdout.splitlines() if "::" in line)


def table() -> str:
    counted, total = collected(), 0
    lines = ["| attack | cases | tests |", "|---|---|---|"]
    for attack, names in HOSTILE.items():
        cases = sum(n for test, n in counted.items() if test in names or test.split("::")[0] in names)
        total += cases
        lines.append(f"| {attack} | {cases} | {' '.join(f'`{name}`' for name in names)} |")
    return "\n".join([*lines, f"| **all** | **{total}** | |"]) + "\n"


def test_hostile_tests_are_counted_as_they_are() -> None:
    names = [name for row in HOSTILE.values() for name in row]
    assert len(names) == len(set(names))
    whole = {name for name in names if "::" not in name}
    assert not [name for name in names if "::" in name and name.split("::")[0] in whole], "counted twice"
    assert missing([(file, function) for file, _, function in (name.partition("::") for name in names)]) == []
    text = THREATS.read_text(encoding="utf-8")
    written = text.split(BEGIN)[1].split(END)[0]
    assert written == table(), "the counts are stale: python tests/test_papers.py --write"


def test_every_file_of_hostile_tests_is_counted() -> None:
    counted = {name.split("::")[0] for names in HOSTILE.values() for name in names}
    there = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*hostile*.py")}
    assert sorted(there - counted) == []


# Commands, files, settings, figures ----------------------------------------------------------------------------------


def spans(page: Path) -> list[str]:
    """What stands in code type on a page, outside of fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def settings() -> set[str]:
    """Every key of the three YAML files, with its section: `policy.least_protection`, and with each part by itself."""
    found: set[str] = set()

    def walk(schema: dict[str, Any], parts: dict[str, Any], before: str) -> None:
        for name, facts in schema.get("properties", {}).items():
            found.update({name, f"{before}{name}"})
            kinds = [facts, *facts.get("anyOf", ()), *facts.get("allOf", ())]
            for reference in (kind["$ref"].rsplit("/", 1)[1] for kind in kinds if "$ref" in kind):
                walk(parts[reference], parts, f"{before}{name}.")

    for kind, _ in DOCUMENTS.values():
        schema = kind.model_json_schema()
        walk(schema, schema.get("$defs", {}), "")
    return found


SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("fl_client", "fl_server", "models", "privacy", "configs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml")
)
OF_OTHERS = {"sudo", "pip install -c constraints.txt .", "HTTPS_PROXY"}


def unknown(span: str) -> bool:
    """Whether `span` is neither a command, nor a file, nor a setting, nor a word of the code."""
    program, _, rest = span.partition(" ")
    if program in PROGRAMS:
        return bool(rest) and rest.split()[0] not in command_names(PROGRAMS[program][0])
    if span.startswith("make "):
        return not re.search(rf"^{span[5:]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    if span.startswith("tests/"):
        return bool(missing(NAMED.findall(f"`{span}`"))) or not NAMED.fullmatch(f"`{span}`")
    if span in OF_OTHERS or span in settings() or (ROOT / span).is_file():
        return False
    if span.startswith("--"):
        return not any(span in option_names(p, name) for p in PROGRAMS for name in command_names(PROGRAMS[p][0]))
    return not all(part in SOURCES for part in span.strip("/").split("/"))


def option_names(program: str, name: str, inner: str = "") -> set[str]:
    """The options of a command; of a group those of its command `inner`, of which it must have one."""
    command = command_of(PROGRAMS[program][0], name)
    if group := getattr(command, "commands", {}):
        command = group[inner] if inner else command
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_what_stands_in_code_type_is_there(page: Path) -> None:
    found = spans(page)
    assert len(found) >= 15
    assert sorted({span for span in found if unknown(span)}) == []


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_commands_are_named_with_options_that_they_have(page: Path) -> None:
    for span in spans(page):
        program, _, rest = span.partition(" ")
        if program in PROGRAMS and rest:
            name, *words = rest.split()
            assert {word for word in words if word.startswith("--")} <= option_names(
                program, name, words[0] if words else ""
            ) | {"--help"}, span


@pytest.mark.parametrize(
    "word", ["policy.no_such_key", "fl-client obey", "--no-such-option", "keys/none.key", "make gold", "zzz.py"]
)
def test_the_search_for_unknown_words_finds_one(word: str) -> None:
    assert unknown(word)


def test_figures_are_those_of_the_code() -> None:
    text = " ".join(PAPERS[0].read_text(encoding="utf-8").split())
    server, limits = ServerFile.model_fields, gateway.Limits()
    said = [
        f"| node | coordinator's gateway | TCP {server['gateway_port'].default} |",
        f"| node, `fl-client` | coordinator's service | TCP {server['service_port'].default} |",
        f"{server['certificate_days'].default} days (`certificate_days`)",
        f"{server['invitation_hours'].default} hours (`invitation_hours`)",
        f"| {8 * calls.TOKEN_BYTES} random bits |",
        f"a request head of at most {limits.head_bytes // 1024} KiB",
        f"a body of at most {gateway.BODY_BYTES_MAX // 2**20} MiB",
        f"waits {limits.handshake_s:.0f} s for a handshake or head",
        f"holds {limits.connections} connections, {limits.connections_per_site} for each site",
        f"takes {consortium.CALLS_MAX} calls at once, of {calls.REQUEST_BYTES_MAX // 2**20} MiB each",
        f"at most {2 * deidentify.FILE_BYTES_MAX // 2**20} MiB in two files",
    ]
    assert limits.handshake_s == limits.head_s
    policy, resources = (DOCUMENTS["site.yaml"][0].model_fields[name].default for name in ("policy", "resources"))
    said += [
        f"ε of {policy.epsilon_per_study:g} for a study, {policy.epsilon_per_year:g} for a year, {policy.epsilon_total:g} in all",
        f"at least {policy.minimum_patients} patients in each part, {policy.maximum_rounds} rounds at most",
        f"`policy.least_protection` {policy.least_protection}, `policy.permit_without_privacy` false",
        f"`resources.minutes_per_round` ({resources.minutes_per_round} by default) and `resources.gpu` (false)",
    ]
    assert not policy.permit_without_privacy and not resources.gpu
    assert resources.memory_gb == 0 and "The defaults set no limit of memory" in text
    assert [phrase for phrase in said if phrase not in text] == []


# The bill of materials -----------------------------------------------------------------------------------------------


def project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def lock() -> str:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_sbom_is_the_lock() -> None:
    assert sbom.WRITTEN.read_text(encoding="utf-8") == sbom.document(project(), lock()), "stale: run `make sbom`"


def test_the_sbom_names_exactly_the_pins_that_are_needed_to_run() -> None:
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(.+)$", lock(), re.MULTILINE))
    assert len(pinned) == len([line for line in lock().splitlines() if line and not line.startswith("#")])
    parts, rest = (
        json.loads(sbom.WRITTEN.read_text(encoding="utf-8"))["components"],
        {*f"{DEV_ONLY} {EXTRA_ONLY}".split()},
    )
    assert {p["name"]: p["version"] for p in parts} == {n: v for n, v in pinned.items() if n not in rest}
    assert [p["purl"] for p in parts] == [f"pkg:pypi/{p['name']}@{p['version']}" for p in parts]
    assert pinned.keys() >= rest


def test_the_sbom_is_valid_and_its_licences_are_spdx() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from license_expression import get_spdx_licensing

    text = sbom.WRITTEN.read_text(encoding="utf-8")
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"id": "MIT"', '"id": "MITT"', 1)) is not None, "it finds nothing wrong"
    for part in json.loads(text)["components"]:
        for said in part["licenses"]:
            words = said.get("expression") or said["license"].get("id", "MIT")
            assert get_spdx_licensing().validate(words).errors == [], part["name"]
            assert "GPL" not in json.dumps(said), f"{part['name']} is not free to ship"


def test_the_graph_of_the_sbom_is_whole_and_reaches_everything() -> None:
    found = json.loads(sbom.WRITTEN.read_text(encoding="utf-8"))
    needs = {entry["ref"]: set(entry["dependsOn"]) for entry in found["dependencies"]}
    root = found["metadata"]["component"]["bom-ref"]
    declared = {
        re.split(r"[<>=]", line)[0]
        for line in re.findall(r'^    "([a-z0-9-]+[^"]*)",', project().split("[project.optional")[0], re.MULTILINE)
    }
    assert {ref.split("/")[1].split("@")[0] for ref in needs[root]} == declared
    seen, todo = set(), {root}
    while todo:
        seen |= todo
        todo = {other for ref in todo for other in needs[ref]} - seen
    assert seen == needs.keys() == {root} | {part["bom-ref"] for part in found["components"]}


def test_another_pin_is_another_sbom_and_the_same_pins_are_the_same_bytes() -> None:
    before = sbom.document(project(), lock())
    shuffled = "\n".join(sorted(lock().splitlines(), reverse=True)) + "\n"
    assert sbom.document(project(), shuffled) == before
    other = sbom.document(project().replace('version = "0.1.0"', 'version = "0.1.1"'), lock())
    assert json.loads(other)["serialNumber"] != json.loads(before)["serialNumber"]
    with pytest.raises(ValueError, match=r"pydicom 9\.9\.9, installed is"):
        sbom.document(project(), re.sub(r"^pydicom==.*$", "pydicom==9.9.9", lock(), flags=re.MULTILINE))
    with pytest.raises(ValueError, match="pins no pydicom"):
        sbom.document(project(), re.sub(r"^pydicom==.*\n", "", lock(), flags=re.MULTILINE))


def write_counts() -> None:
    text = THREATS.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    THREATS.write_text(head + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write_counts()
