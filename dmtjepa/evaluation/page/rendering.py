"""Templates to pages."""

from __future__ import annotations

from typing import Any

import dmtjepa


def render(template: str, **values: Any) -> str:
    """A page. All values are escaped: names of classes and files may hold anything.

    Args:
        template: a file in `templates/`.
        values: by their names in the template; one that is missing is an error.
    """
    import jinja2  # takes a while to import

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dmtjepa.evaluation.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = lambda text: text.replace("`", "").replace("+-", "±")
    return environment.get_template(template).render(version=dmtjepa.__version__, **values) + "\n"
