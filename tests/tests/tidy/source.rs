//! A file as the rules see it: its lines, its tokens, its functions, and which of its lines belong to tests.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use proc_macro2::{TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// A file of the workspace: Rust, or prose.
pub(crate) struct Source {
    /// Relative to the root of the workspace, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
    /// Empty for prose.
    pub(crate) tokens: Vec<Token>,
    pub(crate) functions: Vec<Function>,
    /// Modules that this file declares only for tests, as paths without `.rs`.
    pub(crate) test_modules: Vec<String>,
    /// Whether the whole file belongs to tests: a file of `tests/`, a bench, an example, or a module of tests.
    pub(crate) is_test: bool,
    test_lines: Vec<RangeInclusive<usize>>,
}

/// An identifier, a literal, a bracket or one punctuation character. Comments are not tokens.
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) line: usize,
}

/// A function with a body, in any place.
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) line: usize,
    /// From `fn` to the closing brace.
    pub(crate) lines: usize,
}

impl Source {
    /// Reads a file; panics with the place if it should be Rust and is not.
    pub(crate) fn new(path: &str, text: &str) -> Source {
        let mut source = Source {
            path: path.to_owned(),
            text: text.to_owned(),
            tokens: Vec::new(),
            functions: Vec::new(),
            test_modules: Vec::new(),
            is_test: is_test_path(path),
            test_lines: Vec::new(),
        };
        if source.is_rust() {
            let at = |e: &dyn std::fmt::Display, line| format!("{path}:{line}: {e}");
            let file = syn::parse_file(text).unwrap_or_else(|e| panic!("{}", at(&e, e.span().start().line)));
            source.visit_file(&file);
            let tokens: TokenStream = text.parse().unwrap_or_else(|e| panic!("{}", at(&e, 0)));
            flatten(tokens, &mut source.tokens);
        }
        source
    }

    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Lines with their numbers, from 1.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }

    /// Whether a line belongs to tests.
    pub(crate) fn tests(&self, line: usize) -> bool {
        self.is_test || self.test_lines.iter().any(|lines| lines.contains(&line))
    }

    /// Lines on which these tokens follow each other.
    pub(crate) fn find<'a>(&'a self, wanted: &'a [&str]) -> impl Iterator<Item = usize> + 'a {
        let begins_here =
            move |tokens: &&[Token]| tokens.iter().zip(wanted).all(|(token, wanted)| token.text == *wanted);
        self.tokens.windows(wanted.len()).filter(begins_here).map(|tokens| tokens[0].line)
    }

    fn function(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let (from, to) = (signature.span().start().line, body.span().end().line);
        self.functions.push(Function { name: signature.ident.to_string(), line: from, lines: to - from + 1 });
    }

    /// Notes an item that exists only for tests.
    fn item(&mut self, attributes: &[syn::Attribute], item: &dyn Spanned) -> bool {
        let is_test = attributes.iter().any(|a| {
            let condition = || a.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"));
            a.path().is_ident("test") || (a.path().is_ident("cfg") && condition())
        });
        if is_test {
            let span = item.span();
            self.test_lines.push(span.start().line..=span.end().line);
        }
        is_test
    }

    /// The folder with the modules of this file.
    fn folder(&self) -> &str {
        let path = self.path.trim_end_matches(".rs");
        ["/mod", "/lib", "/main"].iter().find_map(|end| path.strip_suffix(end)).unwrap_or(path)
    }
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        match item {
            syn::Item::Mod(module) => {
                let is_test = self.item(&module.attrs, module);
                if is_test && module.content.is_none() {
                    let path = format!("{}/{}", self.folder(), module.ident);
                    self.test_modules.push(path);
                }
            }
            syn::Item::Fn(function) => {
                self.item(&function.attrs, function);
                self.function(&function.sig, &function.block);
            }
            syn::Item::Impl(of) => drop(self.item(&of.attrs, of)),
            syn::Item::Use(import) => drop(self.item(&import.attrs, import)),
            _ => {}
        }
        visit::visit_item(self, item);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.item(&function.attrs, function);
        self.function(&function.sig, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(body) = &function.default {
            self.function(&function.sig, body);
        }
        visit::visit_trait_item_fn(self, function);
    }
}

/// Marks the files of modules that others declare only for tests.
pub(crate) fn mark_test_modules(sources: &mut [Source]) {
    let modules: BTreeSet<String> = sources.iter().flat_map(|s| s.test_modules.iter().cloned()).collect();
    for source in sources {
        source.is_test |= modules.iter().any(|module| {
            source.path.strip_prefix(module.as_str()).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
        });
    }
}

fn is_test_path(path: &str) -> bool {
    path.split('/').any(|folder| matches!(folder, "tests" | "benches" | "examples"))
}

fn flatten(stream: TokenStream, tokens: &mut Vec<Token>) {
    for tree in stream {
        let line = tree.span().start().line;
        match tree {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    proc_macro2::Delimiter::Parenthesis => ("(", ")"),
                    proc_macro2::Delimiter::Brace => ("{", "}"),
                    proc_macro2::Delimiter::Bracket => ("[", "]"),
                    proc_macro2::Delimiter::None => ("", ""),
                };
                tokens.push(Token { text: open.to_owned(), line });
                flatten(group.stream(), tokens);
                tokens.push(Token { text: close.to_owned(), line: group.span_close().end().line });
            }
            other => tokens.push(Token { text: other.to_string(), line }),
        }
    }
}
