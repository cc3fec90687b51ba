// The form of parameters: its fields have the names of the API's.

// Reads the form. A field that is empty is left out of the request, and the server chooses.
export function read(form) {
  const fields = {};
  for (const input of form.elements) {
    if (input.type === "number" && input.value !== "") fields[input.name] = Number(input.value);
  }
  const stop = form.elements.stop.value.split("\n").filter((line) => line !== "");
  if (stop.length) fields.stop = stop;
  return {
    fields,
    system: form.elements.system.value,
    colored: form.elements.colored.checked,
  };
}

// Marks the field that an error is about; null for none.
export function mark(form, name) {
  for (const input of form.elements) {
    if (input.name === name) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
}

// The first field whose text is no number or out of its range, as far as the browser knows.
export function wrong(form) {
  return [...form.elements].find((input) => !input.checkValidity());
}
