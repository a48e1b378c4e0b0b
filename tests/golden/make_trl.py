"""Golden tensors of TRL's GRPOTrainer and RLOOTrainer, which tests/test_grpo.py compares with.

    pip install torch==2.13.0 trl==1.16.0 && python tests/golden/make_trl.py

TRL trains a random two-layer model with its own code for two updates on one batch of completions
(the second has ratios other than 1), without any download; what its loss function was given and
what it returned goes to trl.json: per-token log-probabilities of policy, sampling policy and
reference, masks, rewards, advantages, losses, and the gradient of the loss with respect to the
policy's log-probabilities.
"""

import json
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

GROUP, PROMPTS, LONGEST = 4, 3, 6
CASES = {
    "grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "beta": 0.04,
                                       "use_bias_correction_kl": False}),
    "dr_grpo": (GRPOTrainer, GRPOConfig, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "importance_sampling_level": "sequence",
                                       "epsilon": 3e-4, "epsilon_high": 4e-4}),
    "unbiased_kl": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "beta": 0.04,
                                              "use_bias_correction_kl": True}),
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.03}),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   eos_token="<end>", unk_token="<unk>")


def record(trainer_class, config_class, choices: dict) -> dict:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
        initializer_range=0.4))
    scored = []

    def reward(completion_ids, **_) -> list[float]:
        """The last group is paid alike, the others by what they wrote."""
        pay = [sum(ids) % 7 / 7 + (1 in ids) for ids in completion_ids]
        pay[-GROUP:] = [0.5] * GROUP
        scored.append(pay)
        return pay

    updates, forwards, advantages, masks = [], [], [], []

    class Recording(trainer_class):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if torch.is_grad_enabled():
                self.logps = result[0]
                self.logps.retain_grad()
            else:  # before the loss: of the policy as it sampled, and of the reference
                forwards.append(result[0].tolist())
            return result

        def _generate_and_score_completions(self, inputs):
            result = super()._generate_and_score_completions(inputs)
            advantages.append(result["advantages"].tolist())  # in the order of the rewards
            masks.append(result["completion_mask"].tolist())
            return result

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            gradient, = torch.autograd.grad(loss, self.logps, retain_graph=True)
            kept = ("completion_mask", "advantages", "old_per_token_logps", "ref_per_token_logps",
                    "old_logps")
            updates.append({name: inputs[name].tolist() for name in kept
                            if inputs.get(name) is not None})
            updates[-1] |= {"logps": self.logps.tolist(), "loss": loss.item(),
                            "gradient": gradient.tolist()}
            return loss

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # TRL loads its reference from where the model came from
        args = config_class(
            output_dir=folder, per_device_train_batch_size=GROUP * PROMPTS, num_generations=GROUP,
            max_completion_length=LONGEST, num_iterations=2, max_steps=2, learning_rate=5e-3,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no", seed=1,
            disable_tqdm=True, bf16=False, gradient_checkpointing=False, **choices)
        data = Dataset.from_dict({"prompt": ["ab", "cdefg", "h"]})
        model = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():  # so that the policy is no longer its reference
            for weight in model.parameters():
                weight += 0.05 * torch.randn_like(weight)
        Recording(model=model, reward_funcs=reward, args=args, train_dataset=data,
                  processing_class=tokenizer).train()
    return {"choices": choices, "rewards": scored[0], "advantages": advantages[0],
            "mask": masks[0], "forwards": forwards, "updates": updates}


def main() -> None:
    golden = {"trl": trl.__version__, "torch": torch.__version__.split("+")[0], "group": GROUP,
              "longest": LONGEST, "cases": {name: record(*case) for name, case in CASES.items()}}
    path = Path(__file__).with_name("trl.json")
    path.write_text(json.dumps(golden) + "\n")
    print(f"{path}: {len(golden['cases'])} cases")


if __name__ == "__main__":
    main()
