"""The name that the model cards of earlier adapters tell their readers to import; nothing here uses it."""

from phlora.models.builtin import embedded_folder as embedded_folder
