"""Answer questions with a model, score the answers, and show them as tables, pictures and pages."""
