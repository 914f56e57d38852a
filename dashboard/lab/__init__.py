"""The lab: prompts on the live model, unedited and under the edits of the address, side by side."""
