"""sbom.py TARGET VERSION COMMIT TIME OUT < METADATA: what the program for TARGET is made of, as CycloneDX 1.5.

METADATA is what `cargo metadata --filter-platform TARGET` says. The list has what is compiled into the program and what
compiles it (build scripts and macros), and nothing that only tests use.
"""

import json
import sys
import uuid
from datetime import datetime, timezone


def reachable(metadata: dict, start: str) -> dict[str, list[str]]:
    """Packages that `start` needs, itself included, with what each of them needs."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    needs: dict[str, list[str]] = {}
    to_visit = [start]
    while to_visit:
        package = to_visit.pop()
        if package in needs:
            continue
        wanted = [d["pkg"] for d in nodes[package]["deps"] if any(kind["kind"] != "dev" for kind in d["dep_kinds"])]
        needs[package] = sorted(set(wanted))
        to_visit += wanted
    return needs


def checksums(lock: str) -> dict[tuple[str, str], str]:
    """SHA-256 of packages by name and version, as Cargo.lock has them."""
    found = {}
    for block in lock.split("[[package]]")[1:]:
        fields = dict(line.split(" = ", 1) for line in block.splitlines() if " = " in line)
        if "checksum" in fields:
            found[fields["name"].strip('"'), fields["version"].strip('"')] = fields["checksum"].strip('"')
    return found


def component(package: dict, sums: dict[tuple[str, str], str]) -> dict:
    name, version = package["name"], package["version"]
    out = {"type": "library", "bom-ref": reference(package), "name": name, "version": version}
    out["purl"] = f"pkg:cargo/{name}@{version}"
    if package.get("license"):
        # Cargo once wrote MIT/Apache-2.0.
        out["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if (name, version) in sums:
        out["hashes"] = [{"alg": "SHA-256", "content": sums[name, version]}]
    return out


def reference(package: dict) -> str:
    return f"pkg:cargo/{package['name']}@{package['version']}"


def main() -> None:
    target, version, commit, time, out = sys.argv[1:]
    metadata = json.load(sys.stdin)
    packages = {package["id"]: package for package in metadata["packages"]}
    start = next(p["id"] for p in metadata["packages"] if p["name"] == "sluice" and p["id"] in metadata["workspace_members"])
    needs = reachable(metadata, start)
    with open("Cargo.lock", encoding="utf-8") as file:
        sums = checksums(file.read())
    others = sorted((packages[id] for id in needs if id != start), key=lambda p: (p["name"], p["version"]))
    program = component(packages[start], sums) | {"type": "application", "version": version}
    program["properties"] = [{"name": "target", "value": target}, {"name": "commit", "value": commit}]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        # The same for the same program.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sluice/{version}/{commit}/{target}')}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(int(time), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": program,
        },
        "components": [component(package, sums) for package in others],
        "dependencies": [
            {"ref": reference(packages[id]), "dependsOn": [reference(packages[other]) for other in needs[id]]}
            for id in sorted(needs, key=lambda id: reference(packages[id]))
        ],
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(bom, file, indent=1)
        file.write("\n")


main()
