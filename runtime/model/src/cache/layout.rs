//! The pages that a model's sequences need, and the place of each layer's rows in them.

use sluice_format::{AttentionSpec, BlockScore, CompressedSpec, GqaSpec, KeyBlocksSpec, LayerSpec, ModelSpec};
use sluice_kernels::{KEY_BLOCK, KvBuffer, KvType};

use super::index::IndexPlace;
use super::key_value::KeyValuePlace;
use super::latent::{LatentPlace, index_width, latent_width};
use super::page::Page;
use super::raw::RawPlace;
use crate::compressed::raw_width;
use crate::recurrent::StateShape;

/// Tokens of a page: those of a block of keys. A smaller page would cut blocks. A larger one would waste more at the end of each
/// sequence, copy more when a fork continues, and keep more before a window. It would not be faster, because attention takes one
/// block at a time, and within a block the rows of a head follow each other.
pub const PAGE_TOKENS: usize = KEY_BLOCK;

/// Positions that a windowed layer keeps in addition to those that the next token sees. With them, a sequence can go back a little
/// (after a draft that was refused) without computing anything again.
pub const WINDOW_SLACK: usize = PAGE_TOKENS;

/// The part of a sequence that pages of a kind hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// Rows of [`PAGE_TOKENS`] positions, in every layer that can see them all.
    Rows,
    /// The same, in the layers with a window of this many positions, including the token's own. These pages go back to the pool as
    /// the window moves on.
    Window(usize),
    /// Rows of entries, each of which represents this many tokens: [`PAGE_TOKENS`] entries, in every layer that has such entries.
    Entries(usize),
    /// The state of every recurrent layer after one token.
    State,
}

impl PageKind {
    /// The most pages that `sequences` sequences need, with `context` tokens and `marks` marks each, and a pass of `rows` rows for
    /// all of them together.
    pub fn most(self, sequences: usize, context: usize, marks: usize, rows: usize) -> u64 {
        let whole = (sequences as u64).saturating_mul(context.div_ceil(PAGE_TOKENS) as u64);
        let marks = (sequences as u64).saturating_mul(marks as u64);
        match self {
            PageKind::Rows => whole,
            PageKind::Entries(ratio) => {
                (sequences as u64).saturating_mul((context / ratio).div_ceil(PAGE_TOKENS) as u64)
            }
            PageKind::Window(window) => {
                let in_pass = Self::in_pass(window, sequences, rows);
                in_pass.min(whole).saturating_add(marks.saturating_mul(self.marked(context)))
            }
            // One page that is read and one that is written.
            PageKind::State => (sequences as u64).saturating_mul(2).saturating_add(marks),
        }
    }

    /// The most pages that a mark keeps in a sequence of up to `context` tokens.
    pub fn marked(self, context: usize) -> u64 {
        match self {
            PageKind::Rows | PageKind::Entries(_) => 0,
            // The window can begin and end in the middle of a page.
            PageKind::Window(window) => {
                let seen = window.saturating_sub(1).div_ceil(PAGE_TOKENS) + 1;
                seen.min(context.div_ceil(PAGE_TOKENS)) as u64
            }
            PageKind::State => 1,
        }
    }

    /// Whether a sequence gives up pages of this kind before it gives up their tokens, so that going back needs a mark.
    pub fn forgets(self) -> bool {
        matches!(self, PageKind::Window(_) | PageKind::State)
    }

    /// Tokens that each row represents.
    pub fn ratio(self) -> usize {
        if let PageKind::Entries(ratio) = self { ratio } else { 1 }
    }

    /// The most pages that `sequences` sequences have in layers with a window of `window` tokens during a pass of `rows` rows.
    pub fn in_pass(window: usize, sequences: usize, rows: usize) -> u64 {
        // The window, with the positions kept before it, begins and ends in the middle of a page, and so do the rows.
        let before = window.saturating_sub(1).saturating_add(WINDOW_SLACK).div_ceil(PAGE_TOKENS) as u64 + 2;
        (sequences as u64).saturating_mul(before).saturating_add((rows / PAGE_TOKENS) as u64)
    }
}

impl std::fmt::Display for PageKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PageKind::Rows => write!(f, "{PAGE_TOKENS} tokens"),
            PageKind::Window(window) => write!(f, "{PAGE_TOKENS} tokens in layers that see {window}"),
            PageKind::Entries(ratio) => write!(f, "{PAGE_TOKENS} entries of {ratio} tokens"),
            PageKind::State => f.write_str("recurrent states"),
        }
    }
}

/// Rows of one layer in the pages of a kind: the number of the buffer, and the first row there. Each head has [`PAGE_TOKENS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    pub(super) buffer: usize,
    pub(super) first: usize,
}

impl Rows {
    /// The row of a head at a place in the page.
    pub(super) fn at(self, head: usize, place: usize) -> usize {
        self.first + head * PAGE_TOKENS + place
    }
}

/// Place of a layer's part of a page.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// Keys and values.
    KeyValue(KeyValuePlace),
    /// Latents, or keys that are also values.
    Latent(LatentPlace),
    /// Entries, each of which represents several tokens.
    Entries(LatentPlace),
    /// Index keys, each of which represents a block of keys.
    BlockKeys(IndexPlace),
    /// Numbers of tokens that are not compressed yet.
    Raw(RawPlace),
    /// Recurrent states.
    State(StatePlace),
}

/// Place of the state of a recurrent layer among a page's numbers.
#[derive(Clone, Copy, Debug)]
pub struct StatePlace {
    first: usize,
    shape: StateShape,
}

impl StatePlace {
    /// The part of a page's numbers that is the state.
    pub(super) fn numbers(self) -> std::ops::Range<usize> {
        self.first..self.first + self.shape.numbers()
    }

    pub(super) fn shape(self) -> StateShape {
        self.shape
    }
}

/// Buffers of the pages of a kind.
#[derive(Clone, Debug)]
pub struct PageLayout {
    pub(super) kind: PageKind,
    pub(super) ty: KvType,
    /// Rows and width of each buffer.
    pub(super) buffers: Vec<(usize, usize)>,
    /// f32 numbers besides the buffers.
    pub(super) numbers: usize,
}

impl PageLayout {
    fn new(kind: PageKind, ty: KvType) -> Self {
        PageLayout { kind, ty, buffers: Vec::new(), numbers: 0 }
    }

    /// What a page holds.
    pub fn kind(&self) -> PageKind {
        self.kind
    }

    /// Bytes of a page's contents.
    pub fn bytes(&self) -> u64 {
        let row =
            |&(rows, width): &(usize, usize)| (rows as u64).saturating_mul(KvBuffer::row_bytes(self.ty, width) as u64);
        let rows = self.buffers.iter().map(row).fold(0, u64::saturating_add);
        rows.saturating_add(4 * self.numbers as u64)
    }

    /// Bytes that a page takes in addition to its contents.
    pub fn overhead(&self) -> u64 {
        Page::overhead(self.buffers.len())
    }

    /// Adds room for `rows` more rows of `width` numbers.
    fn rows(&mut self, rows: usize, width: usize) -> Rows {
        let buffer = self.buffers.iter().position(|b| b.1 == width).unwrap_or_else(|| {
            self.buffers.push((0, width));
            self.buffers.len() - 1
        });
        let first = self.buffers[buffer].0;
        self.buffers[buffer].0 += rows;
        Rows { buffer, first }
    }

    fn numbers(&mut self, count: usize) -> usize {
        self.numbers += count;
        self.numbers - count
    }

    /// Adds room for index keys of `width` numbers.
    fn index(&mut self, width: usize) -> IndexPlace {
        IndexPlace { first: self.numbers(width * PAGE_TOKENS), width }
    }
}

/// One thing that a layer keeps of a sequence. Most layers keep only one.
#[derive(Clone, Copy, Debug)]
struct Store {
    layer: usize,
    /// Number of the kind of its pages.
    kind: usize,
    place: Place,
}

/// The kinds of pages of a model, and each store's place in one of them.
#[derive(Clone, Debug)]
pub struct Layout {
    pages: Vec<PageLayout>,
    /// The stores, layer by layer.
    stores: Vec<Store>,
    /// The first store of each layer.
    first: Vec<usize>,
}

impl Layout {
    /// The layout of a model whose keys and values are of type `ty`. Index keys and states are always f32.
    pub fn new(spec: &ModelSpec, ty: KvType) -> Self {
        let mut layout = Layout { pages: Vec::new(), stores: Vec::new(), first: Vec::with_capacity(spec.layers.len()) };
        for (layer, LayerSpec { attention, .. }) in spec.layers.iter().enumerate() {
            layout.first.push(layout.stores.len());
            layout.add(layer, attention, ty);
            if let Some(ngrams) = spec.ngrams_of(layer).filter(|ngrams| ngrams.conv_reach() > 0) {
                let shape = StateShape::of_inputs(ngrams.conv_reach() * spec.residual_width());
                layout.add_state(layer, shape, ty);
            }
        }
        layout
    }

    /// The layout of a model without layers.
    #[cfg(test)]
    pub fn empty() -> Self {
        Layout { pages: Vec::new(), stores: Vec::new(), first: Vec::new() }
    }

    /// Bytes of rows and states that the token at `position` reads, in all layers.
    pub fn touched(&self, position: usize) -> u64 {
        let store = |(number, store): (usize, &Store)| {
            let records = match self.pages[store.kind].kind {
                PageKind::Rows => position,
                PageKind::Window(window) => position.min(window),
                PageKind::Entries(ratio) => position / ratio,
                PageKind::State => 1,
            };
            (records as u64).saturating_mul(self.record_len(number) as u64)
        };
        self.stores.iter().enumerate().map(store).fold(0, u64::saturating_add)
    }

    /// The most bytes that a mark keeps in a sequence of up to `capacity` tokens.
    pub fn mark_bytes(&self, capacity: usize) -> u64 {
        let kept = |page: &PageLayout| page.kind.marked(capacity).saturating_mul(page.bytes());
        self.pages.iter().map(kept).fold(0, u64::saturating_add)
    }

    /// Adds the stores of a layer.
    fn add(&mut self, layer: usize, attention: &AttentionSpec, ty: KvType) {
        match attention {
            AttentionSpec::Gqa(gqa) => self.add_key_value(layer, gqa, ty),
            AttentionSpec::Mla(mla) => {
                let index = mla.indexer.as_ref().map_or(0, index_width);
                self.store(layer, PageKind::Rows, ty, |page| Place::Latent(latents(page, latent_width(mla), index)));
            }
            AttentionSpec::Delta(spec) => self.add_state(layer, StateShape::of_delta(spec), ty),
            AttentionSpec::Mamba(spec) => self.add_state(layer, StateShape::of_mamba(spec), ty),
            AttentionSpec::Compressed(spec) => self.add_compressed(layer, spec, ty),
        }
    }

    /// Adds stores in the order of [`key_means::RAW`](crate::key_means::RAW) and the constants after it.
    fn add_key_value(&mut self, layer: usize, gqa: &GqaSpec, ty: KvType) {
        let kind = gqa.reach().map_or(PageKind::Rows, PageKind::Window);
        let means = gqa.blocks.as_ref().filter(|blocks| blocks.score == BlockScore::MeanKey);
        let each = gqa.blocks.as_ref().filter(|blocks| blocks.score == BlockScore::LargestKey);
        self.store(layer, kind, ty, |page| {
            Place::KeyValue(KeyValuePlace {
                keys: page.rows(gqa.kv_heads * PAGE_TOKENS, gqa.head_dim),
                values: page.rows(gqa.kv_heads * PAGE_TOKENS, gqa.v_head_dim),
                kv_heads: gqa.kv_heads,
                index: page.index(each.map_or(0, |blocks| blocks.index_head_dim)),
            })
        });
        let Some(&KeyBlocksSpec { index_head_dim: width, block_len, .. }) = means else { return };
        self.store(layer, PageKind::Window(block_len), ty, |page| {
            Place::Raw(RawPlace { first: page.numbers(width * PAGE_TOKENS), width })
        });
        self.store(layer, PageKind::Entries(block_len), ty, |page| Place::BlockKeys(page.index(width)));
    }

    fn add_state(&mut self, layer: usize, shape: StateShape, ty: KvType) {
        self.store(layer, PageKind::State, ty, |page| {
            Place::State(StatePlace { first: page.numbers(shape.numbers()), shape })
        });
    }

    /// Adds stores in the order of [`compressed::WINDOW`](crate::compressed::WINDOW) and the constants after it.
    fn add_compressed(&mut self, layer: usize, spec: &CompressedSpec, ty: KvType) {
        self.store(layer, PageKind::Window(spec.window), ty, |page| Place::Latent(latents(page, spec.head_dim, 0)));
        let Some(compression) = &spec.compression else { return };
        self.store(layer, PageKind::Window(compression.reach()), ty, |page| {
            let width = raw_width(spec.head_dim, compression);
            Place::Raw(RawPlace { first: page.numbers(width * PAGE_TOKENS), width })
        });
        let index = compression.indexer.as_ref().map_or(0, |indexer| indexer.index_head_dim);
        self.store(layer, PageKind::Entries(compression.ratio), ty, |page| {
            Place::Entries(latents(page, spec.head_dim, index))
        });
    }

    /// Adds a store in pages of a kind; `place` makes room for it there.
    fn store(&mut self, layer: usize, kind: PageKind, ty: KvType, place: impl FnOnce(&mut PageLayout) -> Place) {
        let number = self.pages.iter().position(|page| page.kind == kind).unwrap_or_else(|| {
            self.pages.push(PageLayout::new(kind, ty));
            self.pages.len() - 1
        });
        let place = place(&mut self.pages[number]);
        self.stores.push(Store { layer, kind: number, place });
    }

    /// The kinds of pages.
    pub fn pages(&self) -> &[PageLayout] {
        &self.pages
    }

    /// The number of the kind of a store's pages, and its place there.
    pub fn place(&self, store: usize) -> (usize, Place) {
        (self.stores[store].kind, self.stores[store].place)
    }

    /// The layer that a store belongs to.
    pub fn layer_of(&self, store: usize) -> usize {
        self.stores[store].layer
    }

    /// The first store of a layer; its others follow.
    pub fn first_store(&self, layer: usize) -> usize {
        self.first[layer]
    }

    /// The last store of a layer.
    pub fn last_store(&self, layer: usize) -> usize {
        self.first.get(layer + 1).copied().unwrap_or(self.stores.len()) - 1
    }

    /// Stores of all layers.
    pub fn stores(&self) -> usize {
        self.stores.len()
    }

    /// Bytes of a saved record of a store: the rows of a position, an entry, or a state.
    pub fn record_len(&self, store: usize) -> usize {
        let (number, place) = self.place(store);
        let page = &self.pages[number];
        let row = |rows: Rows| KvBuffer::row_bytes(page.ty, page.buffers[rows.buffer].1);
        match place {
            Place::KeyValue(place) => place.kv_heads * (row(place.keys) + row(place.values)) + 4 * place.index.width,
            Place::Latent(place) | Place::Entries(place) => row(place.rows) + 4 * place.index.width,
            Place::BlockKeys(place) => 4 * place.width,
            Place::Raw(place) => 4 * place.width,
            Place::State(place) => 4 * place.shape.kept(),
        }
    }
}

/// Adds room for the rows of one head and as many index keys.
fn latents(page: &mut PageLayout, width: usize, index: usize) -> LatentPlace {
    let rows = page.rows(PAGE_TOKENS, width);
    LatentPlace { rows, index: page.index(index) }
}
