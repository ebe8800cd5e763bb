package userdata

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/agent/inject/inroot"
)

// configKeys are the keys of #cloud-config that are understood, in the order
// they take effect.
var configKeys = []struct {
	name  string
	apply func(*config, *yaml.Node) error
}{
	{"bootcmd", (*config).commands},
	{"write_files", (*config).writeFiles},
	{"hostname", (*config).hostname},
	{"fqdn", (*config).hostname},
	{"timezone", (*config).timezone},
	{"mounts", (*config).mounts},
	{"groups", (*config).groups},
	{"users", (*config).users},
	{"ssh_authorized_keys", (*config).rootKeys},
	{"packages", (*config).packages},
	{"runcmd", (*config).commands},
}

// config is a #cloud-config being applied.
type config struct {
	ctx  context.Context
	o    Options
	root *inroot.Root
}

// applyConfig applies what is understood of a #cloud-config and then fails
// naming what is not.
func applyConfig(ctx context.Context, o Options, data []byte) error {
	keys, err := configMap(data)
	if err != nil {
		return err
	}
	root, err := inroot.Open(o.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	c := &config{ctx: ctx, o: o, root: root}
	var errs []error
	known := make(map[string]bool)
	for _, k := range configKeys {
		known[k.name] = true
		node := keys[k.name]
		if node == nil || node.Tag == "!!null" {
			continue
		}
		if err := k.apply(c, node); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", k.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	var unknown []string
	for k := range keys {
		if !known[k] {
			unknown = append(unknown, k)
		}
	}
	if len(unknown) > 0 {
		slices.Sort(unknown)
		errs = append(errs, fmt.Errorf("%w: #cloud-config keys that need cloud-init in the image: %s", ErrUnsupported, strings.Join(unknown, ", ")))
	}
	return errors.Join(errs...)
}

// configMap is the top of a #cloud-config: its keys and what they stand for.
func configMap(data []byte) (map[string]*yaml.Node, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, errors.New("#cloud-config is not valid YAML" + yamlLine(err))
	}
	if len(doc.Content) == 0 {
		return nil, nil
	}
	top := doc.Content[0]
	if top.Kind == yaml.ScalarNode && top.Tag == "!!null" {
		return nil, nil
	}
	if top.Kind != yaml.MappingNode {
		return nil, errors.New("#cloud-config is not a map of keys")
	}
	keys := make(map[string]*yaml.Node)
	for i := 0; i+1 < len(top.Content); i += 2 {
		k := top.Content[i].Value
		if keys[k] != nil {
			return nil, fmt.Errorf("#cloud-config has the key %s twice", k)
		}
		keys[k] = top.Content[i+1]
	}
	return keys, nil
}

// yamlLine keeps the line number of a YAML error and drops the rest, which may
// quote the text.
func yamlLine(err error) string {
	if _, after, ok := strings.Cut(err.Error(), "line "); ok {
		n := 0
		for n < len(after) && after[n] >= '0' && after[n] <= '9' {
			n++
		}
		if n > 0 {
			return " (line " + after[:n] + ")"
		}
	}
	return ""
}

// decode is node.Decode with an error that quotes no value.
func decode(node *yaml.Node, v any) error {
	if err := node.Decode(v); err != nil {
		return fmt.Errorf("not of the form that is understood (line %d)", node.Line)
	}
	return nil
}

// commands runs a list as one shell script, as cloud-init does: a string is a
// line of it, a list of words a command.
func (c *config) commands(node *yaml.Node) error {
	var list []yaml.Node
	if err := decode(node, &list); err != nil {
		return err
	}
	script := new(bytes.Buffer)
	for i := range list {
		item := &list[i]
		if item.Kind == yaml.ScalarNode {
			fmt.Fprintln(script, item.Value)
			continue
		}
		var words []string
		if err := decode(item, &words); err != nil {
			return err
		}
		for j, w := range words {
			if j > 0 {
				script.WriteByte(' ')
			}
			script.WriteString("'" + strings.ReplaceAll(w, "'", `'\''`) + "'")
		}
		script.WriteByte('\n')
	}
	// By standard input: the command line of a process is everybody's to read.
	return c.o.run(c.ctx, []string{"/bin/sh", "-s"}, script)
}

func (c *config) hostname(node *yaml.Node) error {
	name := node.Value
	if node.Kind != yaml.ScalarNode {
		return errors.New("not a name")
	}
	if err := inject.CheckHostname(name); err != nil {
		return err
	}
	if err := c.root.WriteFile("/etc/hostname", []byte(name+"\n"), 0o644); err != nil {
		return err
	}
	return c.o.run(c.ctx, []string{"hostname", name}, nil)
}

func (c *config) timezone(node *yaml.Node) error {
	zone := node.Value
	file := path.Join("/usr/share/zoneinfo", zone)
	if node.Kind != yaml.ScalarNode || zone == "" || path.IsAbs(zone) || !strings.HasPrefix(file, "/usr/share/zoneinfo/") || !c.root.IsFile(file) {
		return errors.New("no such time zone in /usr/share/zoneinfo")
	}
	if c.root.Exists("/etc/timezone") {
		if err := c.root.WriteFile("/etc/timezone", []byte(zone+"\n"), 0o644); err != nil {
			return err
		}
	}
	return c.root.Symlink(file, "/etc/localtime")
}

type writeFile struct {
	Path        string `yaml:"path"`
	Content     string `yaml:"content"`
	Encoding    string `yaml:"encoding"`
	Owner       string `yaml:"owner"`
	Permissions string `yaml:"permissions"`
	Append      bool   `yaml:"append"`
	Defer       bool   `yaml:"defer"`
}

func (c *config) writeFiles(node *yaml.Node) error {
	var list []writeFile
	if err := decode(node, &list); err != nil {
		return err
	}
	var errs []error
	for i, f := range list {
		if err := c.writeOne(f); err != nil {
			errs = append(errs, fmt.Errorf("file %d: %w", i+1, err))
		}
	}
	return errors.Join(errs...)
}

func (c *config) writeOne(f writeFile) error {
	if !path.IsAbs(f.Path) || path.Clean(f.Path) == "/" {
		return errors.New("its path is not absolute")
	}
	data, err := decodeContent(f.Content, f.Encoding)
	if err != nil {
		return err
	}
	perm := uint64(0o644)
	if f.Permissions != "" {
		if perm, err = strconv.ParseUint(strings.TrimPrefix(f.Permissions, "0o"), 8, 12); err != nil {
			return errors.New("its permissions are not octal digits")
		}
	}
	if f.Append {
		old, err := c.root.ReadFile(f.Path)
		if err != nil && !isNotExist(err) {
			return err
		}
		data = append(old, data...)
	}
	if err := c.root.Mkdir(path.Dir(f.Path), 0o755); err != nil {
		return err
	}
	if err := c.root.WriteFile(f.Path, data, uint32(perm)); err != nil {
		return err
	}
	if f.Owner != "" && f.Owner != "root:root" && f.Owner != "root" {
		return c.o.run(c.ctx, []string{"chown", "-h", "--", f.Owner, f.Path}, nil)
	}
	return nil
}

// decodeContent undoes the encodings that write_files knows.
func decodeContent(s, encoding string) ([]byte, error) {
	data := []byte(s)
	switch encoding {
	case "", "text/plain":
		return data, nil
	case "b64", "base64", "gz+b64", "gz+base64", "gzip+b64", "gzip+base64":
		raw, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s), ""))
		if err != nil {
			return nil, errors.New("its content is not base64")
		}
		data = raw
	case "gz", "gzip":
	default:
		return nil, fmt.Errorf("%w: encoding %q", ErrUnsupported, encoding)
	}
	if !strings.HasPrefix(encoding, "gz") {
		return data, nil
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, errors.New("its content is not gzip")
	}
	plain, err := io.ReadAll(io.LimitReader(z, MaxBytes+1))
	if err != nil {
		return nil, errors.New("its content is not gzip")
	}
	if len(plain) > MaxBytes {
		return nil, fmt.Errorf("%w: more than %d bytes unpacked", ErrLimit, MaxBytes)
	}
	return plain, nil
}
