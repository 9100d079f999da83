//! GB/s beside the library, in turns: at once, and as a stream in the pieces in which reads are hashed.

#![allow(missing_docs, reason = "the macro makes a public function")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use xxhash_rust::xxh3 as library;

/// What the I/O thread hashes between two looks at its engine.
const PIECE: usize = 256 << 10;

fn throughput(c: &mut Criterion) {
    let mut group = c.benchmark_group("xxh3");
    // A name, a table, a piece in the cache, an expert out of memory.
    for len in [64, 4 << 10, 256 << 10, 64 << 20] {
        let bytes = vec![0x5a_u8; len];
        group.throughput(Throughput::Bytes(len as u64));
        let mut run = |name, hash: &dyn Fn(&[u8]) -> u64| {
            group.bench_function(BenchmarkId::new(name, len), |b| b.iter(|| hash(black_box(&bytes))));
        };
        run("64", &sluice_checksum::xxh3_64);
        run("64 library", &library::xxh3_64);
        run("128", &|bytes| sluice_checksum::xxh3_128(bytes) as u64);
        run("128 library", &|bytes| library::xxh3_128(bytes) as u64);
        run("stream", &|bytes| {
            let mut stream = sluice_checksum::Xxh3::new();
            bytes.chunks(PIECE).for_each(|piece| stream.update(piece));
            stream.digest()
        });
        run("stream library", &|bytes| {
            let mut stream = library::Xxh3::new();
            bytes.chunks(PIECE).for_each(|piece| stream.update(piece));
            stream.digest()
        });
    }
    group.finish();
}

criterion_group!(benches, throughput);
criterion_main!(benches);
