package catalog

import (
	"fmt"
	"slices"
	"strconv"
)

// Check says whether value fits the parameter.
func (p *Parameter) Check(value string) error {
	if err := checkText("its value", value, 0, 4096); err != nil {
		return fmt.Errorf("parameter %s: %w", p.Name, err)
	}
	if value == "" && p.Required {
		return fmt.Errorf("parameter %s: it must not be empty", p.Name)
	}
	switch p.Type {
	case "integer":
		if _, err := strconv.ParseInt(value, 10, 64); err != nil {
			return fmt.Errorf("parameter %s: %q is not an integer", p.Name, clip(value))
		}
	case "boolean":
		if value != "true" && value != "false" {
			return fmt.Errorf("parameter %s: %q is neither true nor false", p.Name, clip(value))
		}
	case "choice":
		if !slices.Contains(p.Choices, value) {
			return fmt.Errorf("parameter %s: %q is not one of %q", p.Name, clip(value), p.Choices)
		}
	}
	return nil
}
