"""oci.py VERSION COMMIT TIME OUT ARCHITECTURE=BINARY...: an image without a shell, whose entry is `sluice serve`.

OUT is a tar file with an OCI image layout, one image for each architecture, which `docker load`, `podman load` and `skopeo copy
oci-archive:` take. An image has the program, a folder for models, and a folder for what is remembered of drives and experts;
certificates are part of the program.
"""

import hashlib
import json
import sys
from datetime import datetime, timezone

from archive import Tar, gzipped, read

# An account that owns nothing else.
USER = 65532
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


class Layout:
    """Blobs by their digests."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def add(self, content: bytes, media_type: str) -> dict:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def add_json(self, value: dict, media_type: str) -> dict:
        return self.add(json.dumps(value, sort_keys=True).encode(), media_type)


def rootfs(binary: bytes, time: int) -> bytes:
    tar = Tar(time)
    tar.file("sluice", binary, 0o755)
    # The program runs as an account of its own, and these are what it writes to.
    for folder in ["tmp", "models", "cache"]:
        tar.folder(folder, 0o1777)
    return tar.finished()


def image(layout: Layout, architecture: str, binary: bytes, version: str, commit: str, time: int) -> dict:
    layer = rootfs(binary, time)
    created = datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    config = {
        "architecture": architecture,
        "os": "linux",
        "created": created,
        "config": {
            "User": f"{USER}:{USER}",
            "Entrypoint": ["/sluice", "serve"],
            "Cmd": ["--help"],
            "Env": ["PATH=/", "XDG_CACHE_HOME=/cache", "TMPDIR=/tmp"],
            "WorkingDir": "/models",
            "Volumes": {"/models": {}, "/cache": {}},
            "ExposedPorts": {"8080/tcp": {}},
            "StopSignal": "SIGTERM",
            "Labels": {
                "org.opencontainers.image.title": "sluice",
                "org.opencontainers.image.version": version,
                "org.opencontainers.image.revision": commit,
                "org.opencontainers.image.licenses": "Apache-2.0",
                "org.opencontainers.image.source": "https://github.com/sluice-rs/sluice",
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{"created": created, "created_by": "packaging/oci.py"}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.add_json(config, CONFIG),
        "layers": [layout.add(gzipped(layer), LAYER)],
    }
    return layout.add_json(manifest, MANIFEST) | {"platform": {"architecture": architecture, "os": "linux"}}


def main() -> None:
    version, commit, time, out, *binaries = sys.argv[1:]
    layout = Layout()
    manifests = []
    for argument in binaries:
        architecture, path = argument.split("=", 1)
        manifests.append(image(layout, architecture, read(path), version, commit, int(time)))
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
    name = {"org.opencontainers.image.ref.name": version, "io.containerd.image.name": f"sluice:{version}"}
    # One image is named itself: some programs do not look through two indices.
    top = manifests[0] if len(manifests) == 1 else layout.add_json(index, INDEX)
    outer = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [top | {"annotations": name}]}
    tar = Tar(int(time))
    tar.file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    tar.file("index.json", json.dumps(outer, sort_keys=True).encode())
    for digest in sorted(layout.blobs):
        tar.file(f"blobs/sha256/{digest}", layout.blobs[digest])
    with open(out, "wb") as file:
        file.write(tar.finished())


main()
