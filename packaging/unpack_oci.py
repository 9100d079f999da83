"""unpack_oci.py ARCHIVE ARCHITECTURE FOLDER: the filesystem of an image in FOLDER; prints its entry, one word a line.

Every blob is compared with its digest on the way, as a registry would.
"""

import gzip
import hashlib
import io
import json
import sys
import tarfile


def main() -> None:
    archive, architecture, folder = sys.argv[1:]
    with tarfile.open(archive) as tar:

        def blob(descriptor: dict) -> bytes:
            digest = descriptor["digest"].removeprefix("sha256:")
            content = tar.extractfile(f"blobs/sha256/{digest}").read()
            assert hashlib.sha256(content).hexdigest() == digest, f"{digest} is not what it says"
            assert len(content) == descriptor["size"], f"{digest} has another size"
            return content

        assert json.load(tar.extractfile("oci-layout"))["imageLayoutVersion"] == "1.0.0"
        found = json.load(tar.extractfile("index.json"))["manifests"]
        while any("index" in descriptor["mediaType"] for descriptor in found):
            found = [inner for descriptor in found for inner in json.loads(blob(descriptor))["manifests"]]
        wanted = [d for d in found if d["platform"]["architecture"] == architecture]
        assert len(wanted) == 1, f"{len(wanted)} images for {architecture}"
        manifest = json.loads(blob(wanted[0]))
        config = json.loads(blob(manifest["config"]))
        for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
            content = gzip.decompress(blob(layer))
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == diff_id, "the layer is not what the image says"
            with tarfile.open(fileobj=io.BytesIO(content)) as files:
                files.extractall(folder, filter="tar")
    print("\n".join(config["config"]["Entrypoint"]))


main()
