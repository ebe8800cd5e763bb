// Package userdata understands an instance's user data and runs it, at most
// once per instance, where no cloud-init is installed.
//
// In goes the user data as the metadata server gives it: a script, a
// #cloud-config, an #include list, a MIME multipart of these, each perhaps
// gzipped. What runs may touch the whole machine, being its owner's; Instar's
// own part touches the journal, /run/instar and the files that the
// #cloud-config names. User data is secret: no message quotes it.
package userdata

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/mail"
	"path"
	"strings"
)

// Limits of what is accepted.
const (
	MaxBytes   = 8 << 20 // of all parts together, unpacked
	MaxParts   = 256     // parts of all multiparts together
	MaxNesting = 4       // of multipart, gzip and #include in each other
	MaxURLs    = 32      // of all #include lists together
)

// Kind is what a part of user data is.
type Kind string

// Kinds of parts.
const (
	Script      Kind = "script"
	CloudConfig Kind = "cloud-config"
	Include     Kind = "include"
)

// Part is one piece of user data.
type Part struct {
	Kind Kind
	Name string // file name in the multipart, else "part-N"
	Data []byte
}

// ErrUnsupported is wrapped where user data is of a form that is not run.
var ErrUnsupported = errors.New("unsupported user data")

// ErrLimit is wrapped where user data passes one of the limits.
var ErrLimit = errors.New("user data passes a limit")

// parser counts what has been unpacked so far.
type parser struct {
	bytes, parts, urls int
	out                []Part
}

// Parse splits user data into its parts. #include parts are returned as such:
// see [Fetch].
func Parse(data []byte) ([]Part, error) {
	var p parser
	if err := p.parse(data, "", "", 0); err != nil {
		return nil, err
	}
	return p.out, nil
}

// kindOfLine tells a part by its first line. Forms that other tools know get
// an error which names them.
func kindOfLine(line string) (Kind, error) {
	if strings.HasPrefix(line, "#!") {
		return Script, nil
	}
	switch line {
	case "#cloud-config":
		return CloudConfig, nil
	case "#include", "#include-once":
		return Include, nil
	}
	for _, f := range []string{
		"#cloud-config-archive", "#cloud-config-jsonp", "#cloud-boothook", "#part-handler", "#upstart-job",
		"#template", "## template:", "<powershell>", "<script>",
	} {
		if strings.HasPrefix(strings.ToLower(line), f) {
			return "", fmt.Errorf("%w: %s needs cloud-init in the image", ErrUnsupported, f)
		}
	}
	return "", nil
}

func kindOf(data []byte, mediaType string) (Kind, error) {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	first, _, _ := bytes.Cut(data, []byte("\n"))
	line := strings.TrimRight(string(first[:min(len(first), 200)]), "\r \t")
	if k, err := kindOfLine(line); k != "" || err != nil {
		return k, err
	}
	switch mediaType {
	case "text/cloud-config":
		return CloudConfig, nil
	case "text/x-include-url", "text/x-include-once-url":
		return Include, nil
	case "text/x-shellscript":
		return "", fmt.Errorf("%w: a script without #! at its beginning", ErrUnsupported)
	case "", "text/plain", "application/octet-stream":
		return "", fmt.Errorf("%w: it begins with none of #!, #cloud-config, #include and is neither MIME multipart nor gzip", ErrUnsupported)
	}
	return "", fmt.Errorf("%w: MIME type %q", ErrUnsupported, mediaType)
}

func (p *parser) parse(data []byte, name, mediaType string, depth int) error {
	if depth > MaxNesting {
		return fmt.Errorf("%w: nested more than %d deep", ErrLimit, MaxNesting)
	}
	if bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
		plain, err := p.gunzip(data)
		if err != nil {
			return fmt.Errorf("user data is gzip: %w", err)
		}
		return p.parse(plain, name, mediaType, depth+1)
	}
	if p.bytes += len(data); p.bytes > MaxBytes {
		return fmt.Errorf("%w: more than %d bytes unpacked", ErrLimit, MaxBytes)
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	if isMultipart(data) {
		return p.multipart(data, depth)
	}
	kind, err := kindOf(data, mediaType)
	if err != nil {
		if name != "" {
			return fmt.Errorf("part %q: %w", name, err)
		}
		return err
	}
	if p.parts++; p.parts > MaxParts {
		return fmt.Errorf("%w: more than %d parts", ErrLimit, MaxParts)
	}
	if name == "" {
		name = fmt.Sprintf("part-%d", p.parts)
	}
	p.out = append(p.out, Part{Kind: kind, Name: path.Base(name), Data: data})
	return nil
}

func (p *parser) gunzip(data []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	left := MaxBytes - p.bytes
	plain, err := io.ReadAll(io.LimitReader(z, int64(left)+1))
	if err != nil {
		return nil, err
	}
	if len(plain) > left {
		return nil, fmt.Errorf("%w: more than %d bytes unpacked", ErrLimit, MaxBytes)
	}
	return plain, nil
}

// isMultipart tells whether data begins with a mail header of a multipart.
func isMultipart(data []byte) bool {
	head := strings.ToLower(string(data[:min(len(data), 4096)]))
	for line := range strings.Lines(head) {
		switch {
		case strings.TrimSpace(line) == "":
			return false
		case strings.HasPrefix(line, "content-type:"):
			return strings.Contains(line, "multipart/")
		case !strings.Contains(line, ":") && line[0] != ' ' && line[0] != '\t':
			return false
		}
	}
	return false
}

func (p *parser) multipart(data []byte, depth int) error {
	msg, err := mail.ReadMessage(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("user data is MIME: %w", err)
	}
	_, params, err := mime.ParseMediaType(msg.Header.Get("Content-Type"))
	if err != nil {
		return fmt.Errorf("user data is MIME: %w", err)
	}
	if params["boundary"] == "" {
		return errors.New("user data is MIME: multipart without a boundary")
	}
	r := multipart.NewReader(msg.Body, params["boundary"])
	for n := 1; ; n++ {
		part, err := r.NextRawPart()
		// A wrapped io.EOF says that the closing boundary is missing.
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("user data is MIME: part %d: %w", n, err)
		}
		if n > MaxParts {
			return fmt.Errorf("%w: more than %d parts", ErrLimit, MaxParts)
		}
		body, err := readBody(part)
		if err != nil {
			return fmt.Errorf("user data is MIME: part %d: %w", n, err)
		}
		mediaType, inner, err := mime.ParseMediaType(part.Header.Get("Content-Type"))
		if err != nil {
			mediaType = ""
		}
		if strings.HasPrefix(mediaType, "multipart/") {
			// A multipart within: its own header says how to split it.
			body = append([]byte("Content-Type: "+mime.FormatMediaType(mediaType, inner)+"\r\n\r\n"), body...)
		}
		if err := p.parse(body, part.FileName(), mediaType, depth+1); err != nil {
			return err
		}
	}
}

func readBody(part *multipart.Part) ([]byte, error) {
	var r io.Reader = part
	switch enc := strings.ToLower(part.Header.Get("Content-Transfer-Encoding")); enc {
	case "", "7bit", "8bit", "binary":
	case "base64":
		r = base64.NewDecoder(base64.StdEncoding, &noBlanks{part})
	case "quoted-printable":
		r = quotedprintable.NewReader(part)
	default:
		return nil, fmt.Errorf("%w: transfer encoding %q", ErrUnsupported, enc)
	}
	body, err := io.ReadAll(io.LimitReader(r, MaxBytes+1))
	if err == nil && len(body) > MaxBytes {
		err = fmt.Errorf("%w: more than %d bytes", ErrLimit, MaxBytes)
	}
	return body, err
}

// noBlanks leaves blanks out: base64 in mail may be broken anywhere.
type noBlanks struct{ r io.Reader }

func (n *noBlanks) Read(p []byte) (int, error) {
	for {
		k, err := n.r.Read(p)
		w := 0
		for _, c := range p[:k] {
			if c != ' ' && c != '\t' && c != '\r' && c != '\n' {
				p[w] = c
				w++
			}
		}
		if w > 0 || err != nil {
			return w, err
		}
	}
}
