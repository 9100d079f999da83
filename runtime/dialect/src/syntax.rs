//! The formats of the families, as data.

/// A pair of markers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Marks {
    pub(crate) open: &'static str,
    pub(crate) close: &'static str,
}

/// How a family marks thinking and calls.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Syntax {
    pub(crate) name: &'static str,
    /// Markers around thinking.
    pub(crate) think: Marks,
    /// Markers around the text of an answer.
    pub(crate) answer: Option<Marks>,
    /// Markers around all calls of an answer.
    pub(crate) section: Option<Marks>,
    pub(crate) calls: Calls,
    /// Whether a call also ends thinking: only if a control token begins calls.
    pub(crate) calls_end_thinking: bool,
    pub(crate) ids: Ids,
}

/// The form of a call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Calls {
    /// `{"name": …, "arguments": …}` in JSON.
    Objects(Objects),
    /// A name, a separator, and the arguments in JSON.
    Named(Named),
    /// A name and a tag for each parameter.
    Tagged(Tagged),
    /// A name and fields whose texts stand between tokens.
    Fields(Fields),
    /// Python: `[name(parameter=value)]`, or objects in JSON.
    Python,
    /// OpenAI's harmony: messages to recipients.
    Harmony,
}

impl Calls {
    /// The marker with which a call begins.
    pub(crate) fn open(&self) -> &'static str {
        match self {
            Self::Objects(objects) => objects.open,
            Self::Named(call) => call.open,
            Self::Tagged(call) if call.open.is_empty() => call.name,
            Self::Tagged(call) => call.open,
            Self::Fields(call) => call.open,
            Self::Python => "<|python_start|>",
            Self::Harmony => "",
        }
    }
}

/// Calls that are objects in JSON.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Objects {
    /// Marker before an object or a list of objects.
    pub(crate) open: &'static str,
    /// Marker after it.
    pub(crate) close: Option<&'static str>,
    /// Whether the family's template writes a list, rather than a separate call for each object.
    pub(crate) list: bool,
    /// Whether an answer that begins with an object is also a call.
    pub(crate) bare: bool,
}

/// Calls that consist of a name and arguments.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) open: &'static str,
    pub(crate) separator: &'static str,
    /// `None`: a call ends with its arguments.
    pub(crate) close: Option<&'static str>,
}

/// Calls that consist of a name and fields.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) open: &'static str,
    /// Marker before the name, which ends where the fields begin.
    pub(crate) name: &'static str,
    pub(crate) close: &'static str,
}

/// Calls with a tag for each parameter.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tagged {
    /// Marker before the call.
    pub(crate) open: &'static str,
    /// Marker directly before the name.
    pub(crate) name: &'static str,
    /// Texts that end the name, and whether they belong to the call rather than to the name.
    pub(crate) name_ends: &'static [(&'static str, bool)],
    pub(crate) parameter: Parameter,
    /// Marker that ends the call.
    pub(crate) close: &'static str,
    /// Text that may follow, without any meaning.
    pub(crate) trailer: Option<&'static str>,
    /// Whether a call may begin outside of a section, or with the marker of its name.
    pub(crate) bare: bool,
}

/// The tags of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parameter {
    /// The name between `open` and `middle`, possibly followed by `value`, then the value up to `close`. `lines`: a line break on
    /// each side of the value belongs to the markup.
    Plain { open: &'static str, middle: &'static str, value: &'static str, close: &'static str, lines: bool },
    /// Like `Plain`, with an attribute `string="true|false"` before the `>`.
    Typed { open: &'static str, close: &'static str },
    /// The name is the tag: `{0}<name>value{0}</name>`, and objects and lists are nested tags.
    Nested(&'static str),
}

/// The source of ids for calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ids {
    /// `call_` and 24 characters.
    Long,
    /// Nine characters.
    Nine,
    /// The model writes them: `functions.name:0`.
    Own,
}

const THINK: Marks = Marks { open: "<think>", close: "</think>" };

/// Qwen3, Qwen3-Next, and every model about which nothing else is known: the format of the Hermes models.
pub(crate) static HERMES: Syntax = Syntax {
    name: "hermes",
    think: THINK,
    answer: None,
    section: None,
    calls: Calls::Objects(Objects { open: "<tool_call>", close: Some("</tool_call>"), list: false, bare: false }),
    calls_end_thinking: false,
    ids: Ids::Long,
};

const fn deepseek(name: &'static str) -> Syntax {
    Syntax {
        name,
        think: THINK,
        answer: None,
        section: Some(Marks { open: "<｜tool▁calls▁begin｜>", close: "<｜tool▁calls▁end｜>" }),
        calls: Calls::Named(Named {
            open: "<｜tool▁call▁begin｜>",
            separator: "<｜tool▁sep｜>",
            close: Some("<｜tool▁call▁end｜>"),
        }),
        calls_end_thinking: true,
        ids: Ids::Long,
    }
}

/// DeepSeek V3 and R1, with arguments in a fence of Markdown.
pub(crate) static DEEPSEEK_V3: Syntax = deepseek("deepseek-v3");

/// DeepSeek V3.1.
pub(crate) static DEEPSEEK_V31: Syntax = deepseek("deepseek-v3.1");

const fn dsml(name: &'static str, section: Marks, spaced: bool) -> Syntax {
    let (open, parameter, end, close) = match spaced {
        false => ("<｜DSML｜invoke name=\"", "<｜DSML｜parameter name=\"", "</｜DSML｜parameter>", "</｜DSML｜invoke>"),
        true => {
            ("<｜DSML｜ invoke name=\"", "<｜DSML｜ parameter name=\"", "</｜DSML｜ parameter>", "</｜DSML｜ invoke>")
        }
    };
    Syntax {
        name,
        think: THINK,
        answer: None,
        section: Some(section),
        calls: Calls::Tagged(Tagged {
            open: "",
            name: open,
            name_ends: &[("\">", true)],
            parameter: Parameter::Typed { open: parameter, close: end },
            close,
            trailer: None,
            bare: true,
        }),
        calls_end_thinking: true,
        ids: Ids::Long,
    }
}

/// DeepSeek V3.2.
pub(crate) static DEEPSEEK_V32: Syntax =
    dsml("deepseek-v3.2", Marks { open: "<｜DSML｜function_calls>", close: "</｜DSML｜function_calls>" }, false);

/// DeepSeek V4.
pub(crate) static DEEPSEEK_V4: Syntax =
    dsml("deepseek-v4", Marks { open: "<｜DSML｜tool_calls>", close: "</｜DSML｜tool_calls>" }, false);

/// DeepSeek V4.1.
pub(crate) static DEEPSEEK_V41: Syntax =
    dsml("deepseek-v4.1", Marks { open: "<｜DSML｜ calls>", close: "</｜DSML｜ calls>" }, true);

/// Kimi K2.
pub(crate) static KIMI_K2: Syntax = Syntax {
    name: "kimi-k2",
    think: THINK,
    answer: None,
    section: Some(Marks { open: "<|tool_calls_section_begin|>", close: "<|tool_calls_section_end|>" }),
    calls: Calls::Named(Named {
        open: "<|tool_call_begin|>",
        separator: "<|tool_call_argument_begin|>",
        close: Some("<|tool_call_end|>"),
    }),
    calls_end_thinking: true,
    ids: Ids::Own,
};

/// GLM-4.5 and later.
const fn glm(name: &'static str) -> Syntax {
    Syntax {
        name,
        think: THINK,
        answer: None,
        section: None,
        calls: Calls::Tagged(Tagged {
            open: "<tool_call>",
            name: "",
            name_ends: &[("\n", true), ("<arg_key>", false), ("</tool_call>", false)],
            parameter: Parameter::Plain {
                open: "<arg_key>",
                middle: "</arg_key>",
                value: "<arg_value>",
                close: "</arg_value>",
                lines: false,
            },
            close: "</tool_call>",
            trailer: None,
            bare: false,
        }),
        calls_end_thinking: false,
        ids: Ids::Long,
    }
}

/// GLM-4.5 and 4.6, which put parameters on lines of their own.
pub(crate) static GLM_45: Syntax = glm("glm-4.5");

/// GLM-4.7 and 5, which do not.
pub(crate) static GLM_47: Syntax = glm("glm-4.7");

/// Qwen3-Coder and Qwen3.5.
pub(crate) static QWEN_XML: Syntax = Syntax {
    name: "qwen-xml",
    think: THINK,
    answer: None,
    section: None,
    calls: Calls::Tagged(Tagged {
        open: "<tool_call>",
        name: "<function=",
        name_ends: &[(">", true)],
        parameter: Parameter::Plain { open: "<parameter=", middle: ">", value: "", close: "</parameter>", lines: true },
        close: "</function>",
        trailer: Some("</tool_call>"),
        bare: true,
    }),
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// gpt-oss.
pub(crate) static HARMONY: Syntax = Syntax {
    name: "harmony",
    think: THINK,
    answer: None,
    section: None,
    calls: Calls::Harmony,
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// MiniMax M2.
pub(crate) static MINIMAX_M2: Syntax = Syntax {
    name: "minimax-m2",
    think: THINK,
    answer: None,
    section: Some(Marks { open: "<minimax:tool_call>", close: "</minimax:tool_call>" }),
    calls: Calls::Tagged(Tagged {
        open: "",
        name: "<invoke name=\"",
        name_ends: &[("\">", true)],
        parameter: Parameter::Plain {
            open: "<parameter name=\"",
            middle: "\">",
            value: "",
            close: "</parameter>",
            lines: false,
        },
        close: "</invoke>",
        trailer: None,
        bare: false,
    }),
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// The token before every tag of MiniMax M3.
pub(crate) const M3: &str = "]<]minimax[>[";

/// MiniMax M3.
pub(crate) static MINIMAX_M3: Syntax = Syntax {
    name: "minimax-m3",
    think: Marks { open: "<mm:think>", close: "</mm:think>" },
    answer: None,
    section: Some(Marks { open: "]<]minimax[>[<tool_call>", close: "]<]minimax[>[</tool_call>" }),
    calls: Calls::Tagged(Tagged {
        open: "",
        name: "]<]minimax[>[<invoke name=\"",
        name_ends: &[("\">", true)],
        parameter: Parameter::Nested(M3),
        close: "]<]minimax[>[</invoke>",
        trailer: None,
        bare: false,
    }),
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// The token on both sides of a text in Gemma 4's calls.
pub(crate) const QUOTE: &str = "<|\"|>";

/// Gemma 4.
pub(crate) static GEMMA_4: Syntax = Syntax {
    name: "gemma-4",
    think: Marks { open: "<|channel>thought", close: "<channel|>" },
    answer: None,
    section: None,
    calls: Calls::Fields(Fields { open: "<|tool_call>", name: "call:", close: "<tool_call|>" }),
    calls_end_thinking: true,
    ids: Ids::Long,
};

const MISTRAL_THINK: Marks = Marks { open: "[THINK]", close: "[/THINK]" };

/// Mistral's models until 2024: a list of objects.
pub(crate) static MISTRAL_LIST: Syntax = Syntax {
    name: "mistral-list",
    think: MISTRAL_THINK,
    answer: None,
    section: None,
    calls: Calls::Objects(Objects { open: "[TOOL_CALLS]", close: None, list: true, bare: false }),
    calls_end_thinking: false,
    ids: Ids::Nine,
};

/// Mistral's models since: a name and arguments.
pub(crate) static MISTRAL: Syntax = Syntax {
    name: "mistral",
    think: MISTRAL_THINK,
    answer: None,
    section: None,
    calls: Calls::Named(Named { open: "[TOOL_CALLS]", separator: "[ARGS]", close: None }),
    calls_end_thinking: false,
    ids: Ids::Nine,
};

/// Granite 3: a list of objects.
pub(crate) static GRANITE: Syntax = Syntax {
    name: "granite",
    think: THINK,
    answer: None,
    section: None,
    calls: Calls::Objects(Objects { open: "<|tool_call|>", close: None, list: true, bare: false }),
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// Llama 3.x: a bare object, or one after a token.
pub(crate) static LLAMA_3: Syntax = Syntax {
    name: "llama-3",
    think: THINK,
    answer: None,
    section: None,
    calls: Calls::Objects(Objects { open: "<|python_tag|>", close: None, list: false, bare: true }),
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// Llama 4: a list of calls in Python, or objects as Llama 3 writes them.
pub(crate) static LLAMA_4: Syntax = Syntax {
    name: "llama-4",
    think: THINK,
    answer: None,
    section: None,
    calls: Calls::Python,
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// Hunyuan-A13B: a list of objects, and markers around both the answer and thinking.
pub(crate) static HUNYUAN: Syntax = Syntax {
    name: "hunyuan",
    think: THINK,
    answer: Some(Marks { open: "<answer>", close: "</answer>" }),
    section: None,
    calls: Calls::Objects(Objects { open: "<tool_calls>", close: Some("</tool_calls>"), list: true, bare: false }),
    calls_end_thinking: false,
    ids: Ids::Long,
};

/// Hunyuan 3, whose markers all have the same suffix or none.
macro_rules! hunyuan_3 {
    ($name:literal, $suffix:literal) => {
        Syntax {
            name: $name,
            think: Marks { open: concat!("<think", $suffix, ">"), close: concat!("</think", $suffix, ">") },
            answer: None,
            section: Some(Marks {
                open: concat!("<tool_calls", $suffix, ">"),
                close: concat!("</tool_calls", $suffix, ">"),
            }),
            calls: Calls::Tagged(Tagged {
                open: concat!("<tool_call", $suffix, ">"),
                name: "",
                name_ends: &[
                    (concat!("<tool_sep", $suffix, ">"), true),
                    (concat!("<arg_key", $suffix, ">"), false),
                    (concat!("</tool_call", $suffix, ">"), false),
                ],
                parameter: Parameter::Plain {
                    open: concat!("<arg_key", $suffix, ">"),
                    middle: concat!("</arg_key", $suffix, ">"),
                    value: concat!("<arg_value", $suffix, ">"),
                    close: concat!("</arg_value", $suffix, ">"),
                    lines: false,
                },
                close: concat!("</tool_call", $suffix, ">"),
                trailer: None,
                bare: false,
            }),
            calls_end_thinking: true,
            ids: Ids::Long,
        }
    };
}

/// The preview of Hunyuan 3.
pub(crate) static HUNYUAN_3_PLAIN: Syntax = hunyuan_3!("hunyuan-3-plain", "");

/// The published Hunyuan 3.
pub(crate) static HUNYUAN_3: Syntax = hunyuan_3!("hunyuan-3", ":opensource");
