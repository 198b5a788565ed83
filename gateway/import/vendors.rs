//! Who serves a model, by the word that LiteLLM puts in front of its name, and how they are spoken to here.

/// A vendor or a kind of server.
pub(super) struct Vendor {
    /// The word in front of the slash.
    pub prefix: &'static str,
    /// Its `provider` here.
    pub provider: &'static str,
    /// Where it is, if it is at one place.
    pub base: Option<&'static str>,
    /// The environment variable in which LiteLLM looks for the key.
    pub key: Option<&'static str>,
}

const fn cloud(prefix: &'static str, provider: &'static str, base: &'static str, key: &'static str) -> Vendor {
    Vendor { prefix, provider, base: Some(base), key: Some(key) }
}

const fn own(prefix: &'static str, provider: &'static str) -> Vendor {
    Vendor { prefix, provider, base: None, key: None }
}

/// Those whose servers speak a dialect that passes here as it is.
pub(super) const VENDORS: &[Vendor] = &[
    cloud("openai", "openai", "https://api.openai.com", "OPENAI_API_KEY"),
    cloud("text-completion-openai", "openai", "https://api.openai.com", "OPENAI_API_KEY"),
    cloud("anthropic", "anthropic", "https://api.anthropic.com", "ANTHROPIC_API_KEY"),
    Vendor { prefix: "azure", provider: "azure", base: None, key: Some("AZURE_API_KEY") },
    Vendor { prefix: "azure_text", provider: "azure", base: None, key: Some("AZURE_API_KEY") },
    own("hosted_vllm", "vllm"),
    own("openai_like", "openai"),
    own("custom_openai", "openai"),
    own("litellm_proxy", "openai"),
    own("lm_studio", "openai"),
    own("llamafile", "openai"),
    own("xinference", "openai"),
    own("huggingface", "tgi"),
    Vendor { prefix: "ollama", provider: "openai", base: Some("http://localhost:11434"), key: None },
    Vendor { prefix: "ollama_chat", provider: "openai", base: Some("http://localhost:11434"), key: None },
    cloud("cerebras", "openai", "https://api.cerebras.ai", "CEREBRAS_API_KEY"),
    cloud("deepseek", "openai", "https://api.deepseek.com", "DEEPSEEK_API_KEY"),
    cloud("fireworks_ai", "openai", "https://api.fireworks.ai/inference", "FIREWORKS_AI_API_KEY"),
    cloud("groq", "openai", "https://api.groq.com/openai", "GROQ_API_KEY"),
    cloud("mistral", "openai", "https://api.mistral.ai", "MISTRAL_API_KEY"),
    cloud("moonshot", "openai", "https://api.moonshot.ai", "MOONSHOT_API_KEY"),
    cloud("nvidia_nim", "openai", "https://integrate.api.nvidia.com", "NVIDIA_NIM_API_KEY"),
    cloud("openrouter", "openai", "https://openrouter.ai/api", "OPENROUTER_API_KEY"),
    cloud("sambanova", "openai", "https://api.sambanova.ai", "SAMBANOVA_API_KEY"),
    cloud("together_ai", "openai", "https://api.together.xyz", "TOGETHERAI_API_KEY"),
    cloud("xai", "openai", "https://api.x.ai", "XAI_API_KEY"),
];

/// Names that LiteLLM knows without a word in front.
const BARE: [(&str, &str); 12] = [
    ("gpt-", "openai"),
    ("chatgpt-", "openai"),
    ("o1", "openai"),
    ("o3", "openai"),
    ("o4", "openai"),
    ("text-embedding-", "openai"),
    ("dall-e-", "openai"),
    ("whisper-", "openai"),
    ("tts-", "openai"),
    ("davinci", "openai"),
    ("babbage", "openai"),
    ("claude-", "anthropic"),
];

/// Whose a model is, and its name there.
pub(super) fn vendor_of<'m>(model: &'m str, custom: Option<&str>) -> Result<(&'static Vendor, &'m str), String> {
    if let Some(custom) = custom {
        let name = model.strip_prefix(custom).and_then(|rest| rest.strip_prefix('/')).unwrap_or(model);
        return named(custom).map(|vendor| (vendor, name));
    }
    if let Some((prefix, name)) = model.split_once('/') {
        return named(prefix).map(|vendor| (vendor, name));
    }
    let known = BARE.iter().find(|(begin, _)| model.starts_with(begin));
    match known {
        Some((_, prefix)) => named(prefix).map(|vendor| (vendor, model)),
        None => Err(format!(
            "{model} does not say whose it is: left out; write openai/{model}, hosted_vllm/{model} or the like"
        )),
    }
}

fn named(prefix: &str) -> Result<&'static Vendor, String> {
    VENDORS.iter().find(|vendor| vendor.prefix == prefix).ok_or_else(|| why_not(prefix))
}

fn why_not(prefix: &str) -> String {
    let why = match prefix {
        "bedrock" | "bedrock_converse" | "sagemaker" | "sagemaker_chat" => {
            "AWS wants every request signed and in a dialect of its own"
        }
        "vertex_ai" | "vertex_ai_beta" => "Google's tokens change every hour, and its dialect is its own",
        "gemini" => "Google's paths do not begin with /v1",
        "azure_ai" => "its dialect depends on the model behind it",
        "vllm" => "this runs a model within LiteLLM: start `vllm serve` and say hosted_vllm/",
        _ => "no provider here speaks its dialect",
    };
    format!("{prefix}/ is left out: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provider(model: &str, custom: Option<&str>) -> Result<String, String> {
        vendor_of(model, custom).map(|(vendor, name)| format!("{} {name}", vendor.provider))
    }

    #[test]
    fn a_model_is_known_by_the_word_in_front_or_by_its_name() {
        assert_eq!(provider("openai/gpt-4o", None).unwrap(), "openai gpt-4o");
        assert_eq!(provider("hosted_vllm/Qwen/Qwen3-32B", None).unwrap(), "vllm Qwen/Qwen3-32B");
        assert_eq!(provider("claude-sonnet-4-5", None).unwrap(), "anthropic claude-sonnet-4-5");
        assert_eq!(provider("Qwen/Qwen3", Some("hosted_vllm")).unwrap(), "vllm Qwen/Qwen3");
        assert_eq!(provider("openai/x", Some("openai")).unwrap(), "openai x");
        assert!(provider("bedrock/anthropic.claude", None).unwrap_err().contains("signed"));
        assert!(provider("mystery", None).unwrap_err().contains("does not say whose"));
    }

    #[test]
    fn every_provider_is_one() {
        for vendor in VENDORS {
            assert!(infergate_plugins::provider::named(vendor.provider).is_some(), "{}", vendor.prefix);
        }
    }
}
