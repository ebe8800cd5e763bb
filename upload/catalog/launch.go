package catalog

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime/multipart"
	"net/textproto"
	"regexp"
	"slices"
	"strings"
)

// ParametersFile is where an instance finds the values of its image's
// parameters: NAME='value' lines for a shell, readable by root.
const ParametersFile = "/etc/instar/parameters"

// Arguments checks the values that are given for an image's parameters, and
// fills in defaults. Missing names those that are required and have no value:
// the caller may ask for them.
func (m *Image) Arguments(given map[string]string) (values map[string]string, missing []Parameter, err error) {
	values = map[string]string{}
	for _, p := range m.Parameters {
		v, ok := given[p.Name]
		switch {
		case ok:
			if err := p.Check(v); err != nil {
				return nil, nil, &Error{Code: CodeParameterValue, Message: "A parameter of the image does not fit", Err: err}
			}
			values[p.Name] = v
		case p.Default != "":
			values[p.Name] = p.Default
		case p.Required:
			missing = append(missing, p)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if !slices.ContainsFunc(m.Parameters, func(p Parameter) bool { return p.Name == name }) {
			return nil, nil, refuse(CodeParameterValue, "The image has no parameter %q", clip(name))
		}
	}
	return values, missing, nil
}

var reference = regexp.MustCompile(`\$\{([A-Za-z_][A-Za-z0-9_]{0,63})\}`)

// UserData is what an instance of the image is given: own, the user's, and in
// front of it a part of kind #cloud-config that writes the image's files and the
// values of its parameters. cloud-init and Instar's own injection follow it, once
// per instance. It has at most limit bytes, compressed if it must be. Without
// files and parameters it is own.
func (m *Image) UserData(values map[string]string, own []byte, limit int) ([]byte, error) {
	if len(m.Files) == 0 && len(m.Parameters) == 0 {
		return own, nil
	}
	type file struct {
		Path        string `json:"path"`
		Permissions string `json:"permissions"`
		Owner       string `json:"owner"`
		Encoding    string `json:"encoding"`
		Content     string `json:"content"`
	}
	var files []file
	add := func(path, mode, owner string, content []byte) {
		files = append(files, file{path, mode, owner, "b64", base64.StdEncoding.EncodeToString(content)})
	}
	if len(m.Parameters) > 0 {
		var b strings.Builder
		for _, p := range m.Parameters {
			if v, ok := values[p.Name]; ok {
				fmt.Fprintf(&b, "%s='%s'\n", p.Name, strings.ReplaceAll(v, "'", `'\''`))
			}
		}
		add(ParametersFile, "0600", "root:root", []byte(b.String()))
	}
	for _, f := range m.Files {
		content := f.Content
		if f.Template {
			content = reference.ReplaceAllFunc(content, func(r []byte) []byte {
				v, ok := values[string(r[2:len(r)-1])]
				if !ok {
					return r
				}
				return []byte(v)
			})
		}
		mode, owner := f.Mode, f.Owner
		if mode == "" {
			mode = "0644"
		}
		if owner == "" {
			owner = "root:root"
		}
		add(f.Path, mode, owner, content)
	}
	// JSON is YAML.
	config, err := json.Marshal(map[string]any{"write_files": files})
	if err != nil {
		return nil, err
	}
	data, err := together(append([]byte("#cloud-config\n"), append(config, '\n')...), own)
	if err != nil {
		return nil, err
	}
	if len(data) > limit {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, err := w.Write(data)
		if err := errors.Join(err, w.Close()); err != nil {
			return nil, err
		}
		data = z.Bytes()
	}
	if len(data) > limit {
		return nil, fmt.Errorf("the image's files and the user data have %d bytes, compressed, and an instance is given at most %d", len(data), limit)
	}
	return data, nil
}

// together makes one user data of two.
func together(config, own []byte) ([]byte, error) {
	if len(own) == 0 {
		return config, nil
	}
	kind := ""
	for _, k := range []struct{ begins, kind string }{
		{"#!", "text/x-shellscript"}, {"#cloud-config", "text/cloud-config"}, {"#include", "text/x-include-url"},
	} {
		if bytes.HasPrefix(own, []byte(k.begins)) {
			kind = k.kind
			break
		}
	}
	if kind == "" {
		return nil, errors.New("the image has files or parameters of its own, and the user data beside them must begin with #!, #cloud-config or #include")
	}
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	if err := w.SetBoundary("===============instar-parts=="); err != nil {
		return nil, err
	}
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=\"%s\"\nMIME-Version: 1.0\n\n", w.Boundary())
	for _, p := range []struct {
		kind, name string
		data       []byte
	}{{"text/cloud-config", "image.cfg", config}, {kind, "user-data", own}} {
		h := textproto.MIMEHeader{}
		h.Set("Content-Type", p.kind+"; charset=\"utf-8\"")
		h.Set("Content-Disposition", `attachment; filename="`+p.name+`"`)
		h.Set("Content-Transfer-Encoding", "base64")
		// Both write_files are wanted.
		h.Set("Merge-Type", "list(append)+dict(recurse_list)+str()")
		part, err := w.CreatePart(h)
		if err != nil {
			return nil, err
		}
		text := base64.StdEncoding.EncodeToString(p.data)
		for len(text) > 0 {
			n := min(76, len(text))
			if _, err := fmt.Fprintf(part, "%s\n", text[:n]); err != nil {
				return nil, err
			}
			text = text[n:]
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
