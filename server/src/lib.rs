//! HTTP over generations: the APIs of OpenAI, Anthropic and Ollama, and a page.

pub mod page;
