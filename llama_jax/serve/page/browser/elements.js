// Makes elements. Text is always a text node: nothing here or elsewhere parses HTML.

const SVG = "http://www.w3.org/2000/svg"; // a name, which is never fetched

export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

export function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) node.removeAttribute(name);
    else node.setAttribute(name, value === true ? "" : value);
  }
}

function fill(node, attributes, children) {
  set(node, attributes);
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);
