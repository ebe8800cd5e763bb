package metadata

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"
)

// maxRecord is the most a record's text may have, user data included.
const maxRecord = 256 << 10

// RecordError is everything that is wrong with a record's text, one line each,
// beginning with "NAME:LINE: ".
type RecordError struct{ Lines []string }

func (e *RecordError) Error() string { return strings.Join(e.Lines, "\n") }

// DecodeOptions say what a source allows in the records it reads.
type DecodeOptions struct {
	// ReadFile reads what user-data-file names; nil refuses the key.
	ReadFile func(name string) ([]byte, error)
	// Files allows credentials in files of the server's machine. Records
	// that come over a network must not name them.
	Files bool
}

// Decode reads one record from YAML, completes it and checks it. Unknown keys
// are errors. The error is a *[RecordError] whose lines name the file as given.
func Decode(name string, data []byte, o DecodeOptions) (*Instance, error) {
	if len(data) > maxRecord {
		return nil, &RecordError{[]string{fmt.Sprintf("%s:1: %d bytes are more than the %d a record may have", name, len(data), maxRecord)}}
	}
	in := new(Instance)
	if err := yaml.Load(data, in, yaml.WithKnownFields()); err != nil {
		return nil, &RecordError{yamlLines(name, err)}
	}
	var problems []Problem
	report := func(p Problem) { problems = append(problems, p) }
	if f := in.UserDataFile; f != "" && o.ReadFile != nil {
		if in.UserData != nil || in.UserDataBase64 != "" {
			report(Problem{"user-data-file", "given together with other user data: give one of them"})
		}
		b, err := o.ReadFile(f)
		if err != nil {
			report(Problem{"user-data-file", err.Error()})
		}
		if b == nil {
			b = []byte{}
		}
		in.UserData, in.UserDataFile = b, ""
	}
	for _, p := range in.Complete() {
		report(p)
	}
	if !o.Files {
		for path, k := range in.credentials() {
			if k.File != "" || k.STS != nil && k.STS.SecretFile != "" {
				report(Problem{path, "this source of records may not name files of the server's machine: give the value itself"})
			}
		}
	}
	if problems == nil {
		return in, nil
	}
	var root yaml.Node
	if err := yaml.Load(data, &root); err != nil {
		return nil, &RecordError{yamlLines(name, err)}
	}
	lines := make([]string, 0, len(problems))
	for _, p := range problems {
		lines = append(lines, fmt.Sprintf("%s:%d: %s", name, lineOf(&root, p.Path), p.Error()))
	}
	return nil, &RecordError{lines}
}

// credentials are all the places of a record that name where keys come from.
func (in *Instance) credentials() map[string]*Credentials {
	m := make(map[string]*Credentials)
	if in.Role != nil {
		m["role"] = &in.Role.Credentials
	}
	if in.Identity != nil {
		m["identity-credentials"] = in.Identity
	}
	if in.Launch != nil {
		m["launch.credentials"] = &in.Launch.Credentials
	}
	return m
}

// yamlLines turns the decoder's error into lines that begin with "NAME:LINE: ".
func yamlLines(name string, err error) []string {
	var all []error
	var many *yaml.LoadErrors
	if errors.As(err, &many) {
		for _, e := range many.Errors {
			all = append(all, e)
		}
	} else {
		all = []error{err}
	}
	lines := make([]string, 0, len(all))
	for _, e := range all {
		line, text := 1, e.Error()
		var one *yaml.LoadError
		if errors.As(e, &one) {
			line = max(one.Mark.Line, 1)
			text = one.Message
		}
		lines = append(lines, fmt.Sprintf("%s:%d: %s", name, line, strings.ReplaceAll(text, "\n", " ")))
	}
	return lines
}

// lineOf finds where a path like "interfaces[0].mac" stands; the nearest
// parent's line if it is not there.
func lineOf(n *yaml.Node, path string) int {
	if n.Kind == yaml.DocumentNode && len(n.Content) > 0 {
		n = n.Content[0]
	}
	line := max(n.Line, 1)
	for _, step := range strings.FieldsFunc(path, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		var next *yaml.Node
		switch n.Kind {
		case yaml.MappingNode:
			for i := 0; i+1 < len(n.Content); i += 2 {
				if n.Content[i].Value == step {
					line, next = n.Content[i].Line, n.Content[i+1]
				}
			}
		case yaml.SequenceNode:
			if i, err := strconv.Atoi(step); err == nil && i < len(n.Content) {
				next = n.Content[i]
				line = next.Line
			}
		}
		if next == nil {
			break
		}
		n = next
	}
	return line
}
