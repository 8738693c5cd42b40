"""C-Eval: Chinese examinations in 52 subjects, from middle school to professions (Huang et al., 2023; ceval)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.errors import C2CError
from cache2cache.tasks.base import Question, configs_there, read_rows

REPO = "ceval/ceval-exam"
# fmt: off
SUBJECTS = (
    "accountant", "advanced_mathematics", "art_studies", "basic_medicine", "business_administration",
    "chinese_language_and_literature", "civil_servant", "clinical_medicine", "college_chemistry", "college_economics",
    "college_physics", "college_programming", "computer_architecture", "computer_network", "discrete_mathematics",
    "education_science", "electrical_engineer", "environmental_impact_assessment_engineer", "fire_engineer",
    "high_school_biology", "high_school_chemistry", "high_school_chinese", "high_school_geography",
    "high_school_history", "high_school_mathematics", "high_school_physics", "high_school_politics",
    "ideological_and_moral_cultivation", "law", "legal_professional", "logic", "mao_zedong_thought", "marxism",
    "metrology_engineer", "middle_school_biology", "middle_school_chemistry", "middle_school_geography",
    "middle_school_history", "middle_school_mathematics", "middle_school_physics", "middle_school_politics",
    "modern_chinese_history", "operating_system", "physician", "plant_protection", "probability_and_statistics",
    "professional_tour_guide", "sports_science", "tax_accountant", "teacher_qualification",
    "urban_and_rural_planner", "veterinary_medicine",
)
# fmt: on


def load(split: str, data_dir: Path | None) -> list[Question]:
    """Every subject is a configuration: val (also as validation), dev. Of a mirror, the subjects that it has.

    The answers of test are not public.
    """
    split = "val" if split == "validation" else split
    made = []
    for subject in configs_there(REPO, SUBJECTS, split, data_dir):
        for row in read_rows(REPO, subject, split, data_dir):
            if row["answer"] not in {"A", "B", "C", "D"}:
                raise C2CError(
                    f"{REPO} ({subject}, {split}) row {row['id']} has no answer; expected A to D; take val or dev"
                )
            options = tuple(row[letter] for letter in "ABCD")
            answer = "ABCD".index(row["answer"])
            # Its splits count their rows anew; those of val have always been called by their numbers alone.
            number = row["id"] if split == "val" else f"{split}-{row['id']}"
            made.append(Question(f"{subject}-{number}", row["question"], options, answer, subject))
    return made
