//! Small complete models, and files taken apart so that they can be damaged and sealed again.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::fs;
use std::path::{Path, PathBuf};

use sluice_format::fields::{extent, superblock, table_ref, tensor};
use sluice_format::*;
use xxhash_rust::xxh3::xxh3_128;

/// Deterministic bytes (SplitMix64): the golden file is made of them, so this never changes.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        out.truncate(len);
        out
    }
}

fn mla(q_lora_rank: Option<usize>, scaling: RopeScaling) -> AttentionSpec {
    AttentionSpec::Mla(MlaSpec {
        heads: 2,
        q_lora_rank,
        kv_lora_rank: 16,
        qk_nope_head_dim: 8,
        qk_rope_head_dim: 4,
        v_head_dim: 6,
        latent_norm_eps: 1e-6,
        softmax_scale: 0.25,
        rope: Some(RopeSpec { pairing: RopePairing::Interleaved, theta: 10000.0, dim: 4, scaling }),
        indexer: None,
        head_gate: false,
    })
}

/// Two layers: a dense one, and one with a shared expert and three routed ones.
pub(crate) fn small_spec() -> ModelSpec {
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_max_positions: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: 1.0,
    };
    let router = RouterSpec {
        score: RouterScore::Sigmoid,
        logit_factor: None,
        logit_bias: false,
        choice_bias: true,
        groups: None,
        renormalise: Some(1e-20),
        least_sum: None,
        scale: 2.5,
        expert_scale: false,
        token_table: None,
    };
    let moe = MoeSpec {
        experts: 3,
        top_k: 2,
        width: 24,
        latent: None,
        expert_bias: false,
        weighted_input: false,
        apart: false,
        router,
    };
    let ffn = |dense_width, moe| FfnSpec { dense_width, moe, ..FfnSpec::NONE };
    ModelSpec {
        version: SPEC_VERSION,
        family: "small".into(),
        vocab_size: 20,
        hidden_size: 32,
        max_positions: 256,
        norm_eps: 1e-5,
        factors: Factors::default(),
        norms: NormsSpec::default(),
        layer_scale: false,
        head_bias: false,
        logit_cap: None,
        streams: None,
        gated_streams: None,
        ngrams: Vec::new(),
        layers: vec![
            LayerSpec { attention: mla(None, RopeScaling::None), ffn: ffn(40, None) },
            LayerSpec { attention: mla(Some(8), yarn), ffn: ffn(24, Some(moe)) },
        ],
        prediction: None,
    }
}

/// The small model with a prediction layer like its last layer, that has an embedding and a head of its own.
pub(crate) fn predicting_spec() -> ModelSpec {
    let mut spec = small_spec();
    let layer = spec.layers[1].clone();
    spec.prediction = Some(PredictionSpec { layer, own_embedding: true, own_head: true });
    spec
}

/// Two layers that between them have everything that [`small_spec`] lacks: grouped queries, biases, gates, sinks.
pub(crate) fn gqa_spec() -> ModelSpec {
    let mut spec = small_spec();
    spec.factors = Factors { embedding: 2.0, residual: 0.5, logits: 0.25 };
    for (layer, scope) in spec.layers.iter_mut().zip([QkNormScope::Head, QkNormScope::Whole]) {
        layer.attention = AttentionSpec::Gqa(GqaSpec {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            v_head_dim: 6,
            softmax_scale: 0.25,
            rope: None,
            window: Some(16),
            stretch: None,
            qk_norm: Some(QkNorm { scope, eps: 1e-6, weightless: false, after_rope: false }),
            clip_qkv: Some(8.0),
            temperature: Some(QueryTemperature { slope: 0.1, step: 8 }),
            value_factor: Some(0.5),
            value_norm: None,
            value_is_key: false,
            qkv_bias: true,
            o_bias: true,
            sinks: true,
            output_gate: true,
            head_gate: false,
            blocks: None,
        });
        layer.ffn.dense_gate = true;
        layer.ffn.activation = ActivationSpec::SwigluOai { alpha: 1.5, limit: 7.0 };
        if let Some(moe) = &mut layer.ffn.moe {
            moe.expert_bias = true;
            moe.weighted_input = true;
            moe.router.logit_bias = true;
            moe.router.least_sum = Some(1e-12);
            moe.router.choice_bias = false;
        }
    }
    spec
}

/// Three layers: latent attention with an indexer, with a shared one, and a gated delta net.
pub(crate) fn sparse_spec() -> ModelSpec {
    let mut spec = small_spec();
    let indexer = |shared| IndexerSpec {
        shared,
        index_heads: 3,
        index_head_dim: 8,
        index_top_k: 5,
        pairing: RopePairing::Half,
        key_norm_eps: 1e-6,
    };
    let delta = DeltaSpec {
        key_heads: 2,
        value_heads: 4,
        key_head_dim: 8,
        value_head_dim: 6,
        conv_width: 4,
        norm_eps: 1e-6,
        value_heads_tiled: false,
        decay_rank: None,
        channel_decay: false,
        least_log_decay: None,
        gate_rank: None,
        gate_sigmoid: false,
    };
    let ffn = spec.layers[0].ffn.clone();
    spec.layers = [false, true]
        .map(|shared| {
            let mut attention = mla(Some(8), RopeScaling::None);
            if let AttentionSpec::Mla(mla) = &mut attention {
                mla.indexer = Some(indexer(shared));
            }
            LayerSpec { attention, ffn: ffn.clone() }
        })
        .to_vec();
    spec.layers.push(LayerSpec { attention: AttentionSpec::Delta(delta), ffn });
    spec
}

/// Three layers with several residual streams, a window each, and behind it nothing, entries, and entries of which an indexer
/// chooses; experts by a table and by scores.
pub(crate) fn streams_spec() -> ModelSpec {
    let mut spec = small_spec();
    spec.streams = Some(StreamsSpec { count: 3, iterations: 2, eps: 1e-6 });
    let indexer = EntryIndexerSpec { index_heads: 3, index_head_dim: 6, index_top_k: 2 };
    let compressions = [
        None,
        Some(CompressionSpec { ratio: 8, spans: 1, indexer: None }),
        Some(CompressionSpec { ratio: 4, spans: 2, indexer: Some(indexer) }),
    ];
    let mut ffn = spec.layers[1].ffn.clone();
    ffn.activation = ActivationSpec::SiluClamped { limit: 10.0 };
    let layer = |(i, compression): (usize, Option<CompressionSpec>)| {
        let mut ffn = ffn.clone();
        if let Some(moe) = &mut ffn.moe {
            moe.router.score = RouterScore::SqrtSoftplus;
            (moe.router.choice_bias, moe.router.token_table) = if i == 0 { (false, Some(20)) } else { (true, None) };
        }
        let attention = AttentionSpec::Compressed(CompressedSpec {
            output_groups: 2,
            group_heads: 3,
            output_rank: 5,
            head_dim: 12,
            q_lora_rank: 8,
            window: 16,
            softmax_scale: 0.25,
            norm_eps: 1e-6,
            rope: RopeSpec { pairing: RopePairing::Interleaved, theta: 10000.0, dim: 4, scaling: RopeScaling::None },
            sinks: i > 0,
            compression,
        });
        LayerSpec { attention, ffn }
    };
    spec.layers = compressions.into_iter().enumerate().map(layer).collect();
    spec
}

/// Five layers: Mamba-2 with experts that have no gate and compute in a latent space, grouped-query attention without feed-forward part,
/// a gated delta net with bounded decays, latent attention with gated experts in a
/// latent space, and Mamba-2 once more; heads of both attentions are gated.
pub(crate) fn recurrent_spec() -> ModelSpec {
    let mut spec = sparse_spec();
    let mamba = |groups, conv_bias| {
        let (heads, head_dim, state_dim) = (4, 6, 5);
        AttentionSpec::Mamba(MambaSpec { heads, head_dim, groups, state_dim, conv_width: 3, conv_bias, norm_eps: 1e-6 })
    };
    let mut sparse = small_spec().layers.swap_remove(1).ffn;
    sparse.activation = ActivationSpec::ReluSquared;
    if let Some(moe) = &mut sparse.moe {
        moe.latent = Some(12);
    }
    let dense = FfnSpec { activation: ActivationSpec::ReluSquared, dense_width: 40, ..FfnSpec::NONE };
    let bounded = ActivationSpec::SiluBounded { limit: 7.0 };
    let mut other = FfnSpec { dense_activation: Some(bounded), ..small_spec().layers.swap_remove(1).ffn };
    let mut direct = sparse.clone();
    for (ffn, latent) in [(&mut other, Some(12)), (&mut direct, None)] {
        ffn.moe.iter_mut().for_each(|moe| moe.latent = latent);
    }
    let mut gqa = gqa_spec().layers.swap_remove(0).attention;
    if let AttentionSpec::Gqa(gqa) = &mut gqa {
        (gqa.output_gate, gqa.head_gate) = (false, true);
    }
    let mut latent = mla(None, RopeScaling::None);
    if let AttentionSpec::Mla(mla) = &mut latent {
        mla.head_gate = true;
    }
    let mut delta = spec.layers[2].attention.clone();
    if let AttentionSpec::Delta(delta) = &mut delta {
        (delta.channel_decay, delta.least_log_decay) = (true, Some(-5.0));
    }
    let ffns = [sparse, FfnSpec::NONE, dense, other];
    let attentions = [mamba(2, true), gqa, delta, latent];
    spec.layers = attentions.into_iter().zip(ffns).map(|(attention, ffn)| LayerSpec { attention, ffn }).collect();
    spec.layers.push(LayerSpec { attention: mamba(1, false), ffn: direct });
    spec
}

/// Three layers: a gated delta net with a decay per channel, latent attention without positions, and attention to blocks of keys.
pub(crate) fn hybrid_spec() -> ModelSpec {
    let mut spec = sparse_spec();
    if let AttentionSpec::Mla(mla) = &mut spec.layers[1].attention {
        (mla.indexer, mla.rope) = (None, None);
    }
    if let AttentionSpec::Delta(delta) = &mut spec.layers[2].attention {
        (delta.decay_rank, delta.gate_rank, delta.gate_sigmoid) = (Some(5), Some(3), true);
    }
    spec.layers.swap(0, 2);
    spec.layers[2].attention = gqa_spec().layers.swap_remove(0).attention;
    if let AttentionSpec::Gqa(gqa) = &mut spec.layers[2].attention {
        gqa.window = None;
        gqa.blocks = Some(KeyBlocksSpec {
            index_heads: 2,
            index_head_dim: 8,
            index_norm_eps: 1e-6,
            block_len: 6,
            top_blocks: 3,
            local_blocks: 1,
            score: BlockScore::LargestKey,
        });
    }
    spec
}

/// Two layers with gated streams: a gated delta net, and attention to blocks of keys by their mean; each with a table of n-grams.
pub(crate) fn tables_spec() -> ModelSpec {
    let mut spec = small_spec();
    spec.gated_streams = Some(GatedStreamsSpec { count: 2, rank: 5 });
    let ffn = |layer: usize| spec.layers[layer].ffn.clone();
    let attention = |from: ModelSpec, layer: usize| from.layers[layer].attention.clone();
    let mut layers = vec![
        LayerSpec { attention: attention(sparse_spec(), 2), ffn: ffn(0) },
        LayerSpec { attention: attention(hybrid_spec(), 2), ffn: ffn(1) },
    ];
    if let AttentionSpec::Gqa(GqaSpec { blocks: Some(blocks), .. }) = &mut layers[1].attention {
        (blocks.score, blocks.local_blocks, blocks.index_heads) = (BlockScore::MeanKey, 0, 3);
    }
    spec.layers = layers;
    let table = |layer: usize| NgramSpec {
        layer,
        width: 12,
        multipliers: vec![3, -5, i64::MAX],
        heads: [0, 5, 12, 23].map(|first| NgramHead { first, rows: 5 }).to_vec(),
        table_rows: 2900,
        separator: 1,
        conv_width: 4,
    };
    spec.ngrams = vec![table(0), NgramSpec { table_rows: 28, ..table(1) }];
    spec
}

/// Two layers with layer norms and norms behind the parts, experts apart from the dense part, values that are keys, scales of
/// layers and experts, and a head with a bias.
pub(crate) fn norms_spec() -> ModelSpec {
    let mut spec = gqa_spec();
    spec.norms = NormsSpec { centred: true, behind: true };
    (spec.layer_scale, spec.head_bias, spec.logit_cap) = (true, true, Some(30.0));
    for layer in &mut spec.layers {
        if let AttentionSpec::Gqa(gqa) = &mut layer.attention {
            (gqa.value_is_key, gqa.v_head_dim, gqa.value_norm) = (true, gqa.head_dim, Some(1e-6));
            let scaling = RopeScaling::Divided { divisors: vec![1.0, 2.0, 4.0], attention_factor: 1.25 };
            gqa.rope = Some(RopeSpec { pairing: RopePairing::Half, theta: 10000.0, dim: 6, scaling });
        }
        layer.ffn.activation = ActivationSpec::GeluTanh;
    }
    if let AttentionSpec::Gqa(gqa) = &mut spec.layers[1].attention
        && let Some(rope) = &mut gqa.rope
    {
        rope.scaling = RopeScaling::Partial { pairs: 2 };
    }
    if let Some(moe) = &mut spec.layers[1].ffn.moe {
        moe.apart = true;
        (moe.router.logit_factor, moe.router.expert_scale) = (Some(0.125), true);
        moe.router.score = RouterScore::SparseMixer { jitter: 0.01 };
    }
    spec
}

/// Everything that a file is made of.
pub(crate) struct Content {
    pub(crate) planned: Vec<PlannedExtent>,
    pub(crate) tensors: Vec<TensorRecord>,
    pub(crate) metadata: Metadata,
}

/// Plans a model: matrices take the weight types in turn, the vocabulary is split into parts of `rows_per_part` rows.
pub(crate) fn plan(spec: &ModelSpec, rows_per_part: usize) -> Content {
    // Those of the day when the golden file was made.
    plan_as(spec, rows_per_part, &WeightType::OWN[..7], WeightType::Q8)
}

/// As [`plan`], with matrices of these types, and a head of another.
pub(crate) fn plan_as(spec: &ModelSpec, rows_per_part: usize, types: &[WeightType], head: WeightType) -> Content {
    let mut content = Content { planned: Vec::new(), tensors: Vec::new(), metadata: Metadata::default() };
    let mut types = types.iter().copied().cycle();
    let mut add = |kind, layer, indices: std::ops::Range<u32>, shapes: Vec<TensorShape>, ty: Option<WeightType>| {
        let index = if kind == ExtentKind::Expert { ANY_INDEX } else { indices.start };
        let mut records: Vec<_> = shapes
            .iter()
            .map(|s| TensorRecord {
                kind,
                weight_type: match (ty, s.layout) {
                    (Some(ty), _) => ty,
                    (None, Layout::Plain) => WeightType::F32,
                    (None, _) => types.next().expect("the cycle is endless"),
                },
                layout: s.layout,
                layer,
                index,
                shape: s.shape.map(|d| d as u64),
                offset: 0,
                len: 0,
                name: s.name.to_owned(),
            })
            .collect();
        let logical_len = pack_tensors(&mut records).expect("small tensors have lengths");
        content.planned.extend(indices.map(|index| PlannedExtent { kind, layer, index, logical_len }));
        content.tensors.extend(records);
    };
    add(ExtentKind::FinalNorm, NO_LAYER, 0..1, spec.tensors(ExtentKind::FinalNorm, 0), None);
    let mut tables = vec![(ExtentKind::Embedding, NO_LAYER), (ExtentKind::Head, NO_LAYER)];
    if let (Some(prediction), Some(layer)) = (&spec.prediction, spec.prediction_layer()) {
        let own = [(ExtentKind::Embedding, prediction.own_embedding), (ExtentKind::Head, prediction.own_head)];
        tables.extend(own.into_iter().filter(|(_, own)| *own).map(|(kind, _)| (kind, layer as u32)));
    }
    for (kind, of) in tables {
        let ty = if kind == ExtentKind::Head { head } else { WeightType::Bf16 };
        for (part, first) in (0..spec.vocab_size).step_by(rows_per_part).enumerate() {
            let rows = rows_per_part.min(spec.vocab_size - first);
            let shape = spec.part_tensor(kind, rows, ty).expect("embedding and head have parts");
            add(kind, of, part as u32..part as u32 + 1, vec![shape], Some(ty));
        }
    }
    let dense = [ExtentKind::Prediction, ExtentKind::Attention, ExtentKind::Router, ExtentKind::Dense].as_slice();
    for kinds in [dense, &[ExtentKind::Expert]] {
        for layer in 0..spec.all_layers().count() {
            for &kind in kinds {
                let count = spec.extent_count(kind, layer) as u32;
                if count > 0 {
                    add(kind, layer as u32, 0..count, spec.tensors(kind, layer), None);
                }
            }
        }
    }
    for ngrams in &spec.ngrams {
        // More than fit into a sector.
        let height = 1500;
        for (part, first) in (0..ngrams.table_rows as usize).step_by(height).enumerate() {
            let shape = ngrams.part_tensor(height.min(ngrams.table_rows as usize - first));
            let part = part as u32;
            add(ExtentKind::Table, ngrams.layer as u32, part..part + 1, vec![shape], Some(WeightType::Bf16));
        }
    }
    content.metadata.insert(SPEC_BLOB, spec.to_json());
    content.metadata.insert(PROVENANCE_BLOB, br#"{"made_by":"a test"}"#.to_vec());
    content.metadata.insert(SOURCE_CONFIG_BLOB, b"{}".to_vec());
    content.metadata.insert(TOKENIZER_BLOB, b"{\"version\":\"1.0\"}\n".to_vec());
    content
}

/// Writes a model of pseudo-random weights.
pub(crate) fn write(path: &Path, content: &Content, page_size: u32) -> Result<ModelId, FormatError> {
    let writer = FileWriter::open(path, FileLayout::new(page_size, &content.planned)?)?;
    let mut random = Random(1);
    let written: Result<Vec<Written>, _> = (0..content.planned.len())
        .map(|i| {
            let bytes = random.bytes(content.planned[i].logical_len as usize);
            let mut extent = writer.extent(i);
            let (front, back) = bytes.split_at(bytes.len() / 3);
            extent.write(front)?;
            extent.write(back)?;
            extent.finish()
        })
        .collect();
    writer.finish(&written?, &content.tensors, &content.metadata).map(|(id, _)| id)
}

/// The small model with extents of several pages each, whose matrices have this type.
pub(crate) fn wide(ty: WeightType) -> Content {
    let mut spec = small_spec();
    spec.hidden_size = 128;
    if let Some(moe) = &mut spec.layers[1].ffn.moe {
        moe.width = 32;
    }
    plan_as(&spec, 20, &[ty], ty)
}

/// The weights of an extent as they are in trained models: few exponents.
pub(crate) fn trained(content: &Content, extent: usize) -> Vec<u8> {
    let mut random = Random(extent as u64);
    let mut bytes = random.bytes(content.planned[extent].logical_len as usize);
    for pair in bytes.chunks_exact_mut(2) {
        pair[1] = [0x3b, 0xbb, 0x3c, 0xbc][usize::from(pair[1] & 3)];
    }
    bytes
}

/// Writes a model of such weights in volumes of at most `most` bytes, beside a name that it would have as one file; returns where
/// they are.
pub(crate) fn write_parts(whole: &Path, content: &Content, most: u64, compress: bool) -> Vec<PathBuf> {
    let layout = FileLayout::new(4096, &content.planned).expect("it can be laid out");
    let layout = layout.split(most, 3 * 4096).expect("it can be split");
    let partial = |volume| whole.with_extension(format!("partial-{volume}"));
    let file = |volume| {
        let path = partial(volume);
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        (path, file.expect("a file"))
    };
    let files: Vec<_> = (0..layout.ends().len()).map(file).collect();
    let spare = files.len();
    let mut writer = FileWriter::of_files(files, layout).expect("it can be written");
    if compress {
        writer.compress(&content.tensors);
    }
    let write = |i| {
        let mut extent = writer.extent(i);
        extent.write(&trained(content, i)).expect("it is written");
        extent.finish().expect("it has its place")
    };
    let written: Vec<_> = (0..content.planned.len()).map(write).collect();
    let (_, lens) = writer.finish(&written, &content.tensors, &content.metadata).expect("it is a model");
    let name = VolumeName::first_of(whole, lens.len() as u16);
    let to = |volume| if lens.len() == 1 { name.whole() } else { name.path_of(volume as u16) };
    let paths: Vec<_> = (0..lens.len()).map(to).collect();
    paths.iter().enumerate().for_each(|(volume, path)| fs::rename(partial(volume), path).expect("it is renamed"));
    (lens.len()..spare).for_each(|volume| fs::remove_file(partial(volume)).expect("it is removed"));
    paths
}

/// Writes a model of such weights striped over folders, which can be the same; returns where its volumes are.
pub(crate) fn write_striped(folders: &[PathBuf], content: &Content, shares: &[u32], compress: bool) -> Vec<PathBuf> {
    let layout = FileLayout::new(4096, &content.planned).expect("it can be laid out");
    let layout = layout.stripe(Shares::new(shares).expect("possible shares")).expect("it can be striped");
    let name = VolumeName::first_of(&folders[0].join("m.sluice"), folders.len() as u16);
    let file = |(volume, folder): (usize, &PathBuf)| {
        let path = folder.join(name.path_of(volume as u16).file_name().expect("it has a name"));
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        (path, file.expect("a file"))
    };
    let files: Vec<_> = folders.iter().enumerate().map(file).collect();
    let paths: Vec<_> = files.iter().map(|(path, _)| path.clone()).collect();
    let mut writer = FileWriter::of_files(files, layout).expect("it can be written");
    // Beside the first needs no name.
    let recorded = |folder: &PathBuf| if *folder == folders[0] { PathBuf::new() } else { folder.clone() };
    writer.set_folders(folders[1..].iter().map(recorded).collect());
    if compress {
        writer.compress(&content.tensors);
    }
    let write = |i| {
        let bytes = trained(content, i);
        let mut extent = writer.extent(i);
        // In pieces that have nothing to do with stripes.
        bytes.chunks(5000).for_each(|piece| extent.write(piece).expect("it is written"));
        extent.finish().expect("it has its place")
    };
    // In any order.
    let mut written: Vec<_> = (0..content.planned.len()).rev().map(write).collect();
    written.reverse();
    let (_, lens) = writer.finish(&written, &content.tensors, &content.metadata).expect("it is a model");
    assert_eq!(lens.len(), folders.len());
    paths
}

/// A folder that goes away with the test, and a file name in it.
pub(crate) fn temp() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.sluice");
    (dir, path)
}

/// The bytes of a model.
pub(crate) fn file_of(spec: &ModelSpec, page_size: u32) -> Vec<u8> {
    let (_dir, path) = temp();
    write(&path, &plan(spec, 8), page_size).expect("the model is written");
    fs::read(&path).expect("the model is read")
}

/// The bytes of the small model.
pub(crate) fn small_file(page_size: u32) -> Vec<u8> {
    file_of(&small_spec(), page_size)
}

/// Writes bytes and opens them as a model.
pub(crate) fn open_bytes(path: &Path, bytes: &[u8]) -> Result<ModelFile, FormatError> {
    fs::write(path, bytes).expect("bytes are written");
    ModelFile::open(path)
}

/// The variant's name.
pub(crate) fn variant(error: &FormatError) -> String {
    let debug = format!("{error:?}");
    debug.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
}

/// A file taken apart. [`Image::seal`] puts it together with right lengths and checksums, whatever the parts say.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) superblock: Vec<u8>,
    pub(crate) body: Vec<u8>,
    pub(crate) extents: Vec<[u8; extent::LEN]>,
    pub(crate) tensors: Vec<[u8; tensor::LEN]>,
    /// Before compression.
    pub(crate) metadata: Vec<u8>,
}

/// The bytes of the metadata before compression, if they can be had.
pub(crate) fn blobs(superblock: &[u8], region: &[u8]) -> Option<Vec<u8>> {
    const MOST: u64 = 1 << 20;
    if get(superblock, 8, 4) == 1 {
        return Some(region.to_vec());
    }
    let len = get(region.get(..8)?, 0, 8);
    zstd::bulk::decompress(&region[8..], usize::try_from(len).ok().filter(|_| len <= MOST)?).ok()
}

/// The logical bytes of the region that these blobs are stored in.
fn region(superblock: &[u8], blobs: &[u8]) -> Vec<u8> {
    match get(superblock, 8, 4) {
        1 => blobs.to_vec(),
        _ => [(blobs.len() as u64).to_le_bytes().as_slice(), &zstd::bulk::compress(blobs, 12).unwrap()].concat(),
    }
}

pub(crate) fn get(bytes: &[u8], offset: usize, len: usize) -> u64 {
    let mut raw = [0; 8];
    raw[..len].copy_from_slice(&bytes[offset..offset + len]);
    u64::from_le_bytes(raw)
}

pub(crate) fn set(bytes: &mut [u8], offset: usize, len: usize, value: u64) {
    bytes[offset..offset + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

/// Offset and length of a field by its name.
pub(crate) fn at(fields: &[fields::Field], name: &str) -> (usize, usize) {
    let f = fields.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no field {name}"));
    (f.offset, f.len)
}

impl Image {
    pub(crate) fn of(file: &[u8]) -> Self {
        let page = get(file, 12, 4) as usize;
        let table = |name| {
            let start = at(&superblock::FIELDS, name).0;
            let (offset, logical) = (get(file, start, 8) as usize, get(file, start + 16, 8) as usize);
            &file[offset..offset + logical]
        };
        let first_table = get(file, at(&superblock::FIELDS, "extents").0, 8) as usize;
        Image {
            superblock: file[..page].to_vec(),
            body: file[page..first_table].to_vec(),
            extents: table("extents").as_chunks().0.to_vec(),
            tensors: table("tensors").as_chunks().0.to_vec(),
            metadata: blobs(file, table("metadata")).expect("the metadata is sound"),
        }
    }

    pub(crate) fn metadata(&self) -> Metadata {
        let mut out = Metadata::default();
        let mut rest = &self.metadata[4..];
        while !rest.is_empty() {
            let (name, len) = (get(rest, 0, 4) as usize, get(rest, 4, 8) as usize);
            let text = std::str::from_utf8(&rest[12..12 + name]).expect("names are UTF-8");
            out.insert(text, rest[12 + name..12 + name + len].to_vec());
            rest = &rest[12 + name + len..];
        }
        out
    }

    /// Replaces the spec by what `change` makes of its JSON.
    pub(crate) fn change_spec(&mut self, change: impl FnOnce(&mut serde_json::Value)) {
        let mut metadata = self.metadata();
        let json = metadata.get(SPEC_BLOB).expect("the image has a spec");
        let mut json = serde_json::from_slice(json).expect("the spec is JSON");
        change(&mut json);
        metadata.insert(SPEC_BLOB, serde_json::to_vec(&json).expect("JSON serialises"));
        self.metadata = metadata.to_bytes();
    }

    pub(crate) fn set_extent(&mut self, record: usize, name: &str, value: u64) {
        let (offset, len) = at(&extent::FIELDS, name);
        set(&mut self.extents[record], offset, len, value);
    }

    pub(crate) fn set_tensor(&mut self, record: usize, name: &str, value: u64) {
        let (offset, len) = at(&tensor::FIELDS, name);
        set(&mut self.tensors[record], offset, len, value);
    }

    /// The file: body, tables, metadata; places, checksums and model id in the superblock follow from them, then `adjust`
    /// changes the superblock, then its own checksum follows.
    pub(crate) fn seal_with(&self, adjust: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let page = self.superblock.len();
        let mut sb = self.superblock.clone();
        let mut out = [sb.as_slice(), &self.body].concat();
        let region = region(&sb, &self.metadata);
        let of_id = [self.extents.as_flattened(), self.tensors.as_flattened(), &self.metadata];
        let ids: Vec<u8> = of_id.iter().flat_map(|t| xxh3_128(t).to_le_bytes()).collect();
        let tables = [of_id[0], of_id[1], &region];
        for (name, bytes) in ["extents", "tensors", "metadata"].into_iter().zip(tables) {
            let offset = out.len();
            out.extend(bytes);
            out.resize(offset + bytes.len().max(1).next_multiple_of(page), 0);
            let fields = [offset as u64, (out.len() - offset) as u64, bytes.len() as u64, checksum(&out[offset..])];
            for (f, value) in table_ref::FIELDS.iter().zip(fields) {
                set(&mut sb, at(&superblock::FIELDS, name).0 + f.offset, f.len, value);
            }
        }
        let id = at(&superblock::FIELDS, "model_id").0;
        sb[id..id + 16].copy_from_slice(&xxh3_128(&ids).to_le_bytes());
        let file_len = at(&superblock::FIELDS, "file_len").0;
        set(&mut sb, file_len, 8, out.len() as u64);
        adjust(&mut sb);
        seal_superblock(&mut sb);
        out[..page].copy_from_slice(&sb);
        out
    }

    pub(crate) fn seal(&self) -> Vec<u8> {
        self.seal_with(|_| ())
    }
}

/// Gives the page its checksum.
pub(crate) fn seal_superblock(page: &mut [u8]) {
    let (offset, len) = at(&superblock::FIELDS, "checksum");
    set(page, offset, len, 0);
    let sum = checksum(page);
    set(page, offset, len, sum);
}

/// Changes bytes of each volume of a model, one at a time: all of the first ones (the superblock's fields), and a sample of the others,
/// which go through the same few checksums. Opening or verifying must notice each.
pub fn every_change_is_noticed(paths: &[PathBuf], first: usize) {
    for path in paths {
        let bytes = fs::read(path).unwrap();
        for at in (0..first).chain((first..bytes.len()).step_by(509)).chain([bytes.len() - 1]) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            fs::write(path, damaged).unwrap();
            let noticed = match ModelFile::open(&paths[0]) {
                Ok(model) => !model.verify_all(&mut |_| ()).is_empty(),
                Err(_) => true,
            };
            assert!(noticed, "byte {at} of {}", path.display());
        }
        fs::write(path, bytes).unwrap();
    }
}
