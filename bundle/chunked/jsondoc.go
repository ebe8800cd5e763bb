package chunked

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"
)

// document is one kind of JSON document (SPEC.md §7).
type document interface {
	format() string // its "format", and the namespace of its signatures if it is signed
	limit() int     // bytes it has at most
	check() error   // of every field
	fields(f *form) // in their order, behind format and version
}

// encode gives the one encoding that d has.
func encode(d document) ([]byte, error) {
	if err := d.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, naming(d.format(), err))
	}
	f := &form{}
	f.document(d)
	if len(f.b) > d.limit() {
		return nil, bad(ErrLimit, d.format()+" document", "it needs %d bytes, more than %d", len(f.b), d.limit())
	}
	return f.b, nil
}

// decode reads a document into d, which is empty, and accepts only what encode
// gives: one document, one sequence of bytes.
func decode(d document, b []byte) error {
	object := d.format() + " document"
	if len(b) > d.limit() {
		return bad(ErrLimit, object, "%d bytes are more than %d", len(b), d.limit())
	}
	f := &form{b: b, reading: true}
	f.document(d)
	if f.err == nil && len(f.rest()) > 0 {
		f.fail("text behind its end")
	}
	if f.err != nil {
		return naming(d.format(), f.err)
	}
	if err := d.check(); err != nil {
		return naming(d.format(), err)
	}
	if again, err := encode(d); err != nil || !bytes.Equal(again, b) {
		return &Error{Class: ErrFormat, Object: object, Detail: "it is not in the one form that is allowed", Err: err}
	}
	return nil
}

// naming says which document an error is about.
func naming(format string, err error) error {
	var e *Error
	if errors.As(err, &e) && e.Object == "" {
		named := *e
		named.Object = format + " document"
		return &named
	}
	return &Error{Class: ErrFormat, Object: format + " document", Err: err}
}

// form writes a document, or reads one: the same calls in the same order do
// both, so that what is read is what would be written. Reading takes memory
// only for values that are there in full.
type form struct {
	b       []byte // written, or to be read
	reading bool
	at      int // reading: bytes that are behind
	depth   int
	some    bool // something stands before at this depth
	err     error
}

func (f *form) document(d document) {
	f.begin('{')
	format, v := d.format(), int64(version)
	f.text("format", &format)
	if f.reading && f.err == nil && format != d.format() {
		f.fail("format is %q", clip(format))
	}
	f.number("version", &v)
	if f.reading && f.err == nil && v != version {
		f.err = bad(ErrVersion, "", "version %d; this program knows version %d: use a newer one", v, version)
	}
	d.fields(f)
	f.end('}')
	f.literal("\n")
}

func (f *form) rest() []byte { return f.b[f.at:] }

// fail keeps the first thing that is wrong, and where.
func (f *form) fail(format string, a ...any) {
	if f.err == nil {
		line := bytes.Count(f.b[:f.at], []byte("\n")) + 1
		f.err = bad(ErrFormat, "", "line %d: %s", line, fmt.Sprintf(format, a...))
	}
}

// literal is text that must be there.
func (f *form) literal(s string) {
	switch {
	case f.err != nil:
	case !f.reading:
		f.b = append(f.b, s...)
	case f.ahead(s):
		f.at += len(s)
	default:
		f.fail("%q is expected, not %q", s, clip(string(f.rest()[:min(len(s)+8, len(f.rest()))])))
	}
}

func (f *form) ahead(s string) bool { return bytes.HasPrefix(f.rest(), []byte(s)) }

const indents = "\n                        "

func (f *form) line() string { return indents[:1+2*f.depth] }

func (f *form) begin(c byte) {
	f.literal(string(c))
	f.depth++
	f.some = false
}

func (f *form) end(c byte) {
	f.depth--
	if f.some {
		f.literal(f.line())
	}
	f.literal(string(c))
	f.some = true
}

// item begins an element of an object or array.
func (f *form) item() {
	if f.some {
		f.literal(",")
	}
	f.literal(f.line())
	f.some = true
}

func (f *form) key(name string) {
	f.item()
	f.literal(`"` + name + `": `)
}

// present says whether an optional field is there: reading, by its key.
func (f *form) present(key string, written bool) bool {
	if !f.reading {
		return written
	}
	return f.err == nil && f.ahead(`,`+f.line()+`"`+key+`": `)
}

func (f *form) text(key string, s *string) {
	f.key(key)
	f.quoted(s)
}

// optional leaves out what is empty.
func (f *form) optional(key string, s *string) {
	if f.present(key, *s != "") {
		f.text(key, s)
	}
}

func (f *form) quoted(s *string) {
	f.literal(`"`)
	if !f.reading {
		for i := range len(*s) {
			if c := (*s)[i]; c == '"' || c == '\\' {
				f.b = append(f.b, '\\')
			}
			f.b = append(f.b, (*s)[i])
		}
	} else if f.err == nil {
		*s = f.unquote()
	}
	f.literal(`"`)
}

// unquote reads up to the quote that ends a string.
func (f *form) unquote() string {
	p := f.rest()
	n := bytes.IndexByte(p, '"')
	if n >= 0 && bytes.IndexByte(p[:n], '\\') < 0 { // nearly always
		f.at += n
		return f.utf8(p[:n])
	}
	var out []byte
	for i := 0; i < len(p); i++ {
		switch c := p[i]; {
		case c == '"':
			f.at += i
			return f.utf8(out)
		case c == '\n':
			f.fail("a string does not end")
			return ""
		case c == '\\':
			if i++; i == len(p) || p[i] != '"' && p[i] != '\\' {
				f.fail(`an escape other than \" and \\`)
				return ""
			}
		}
		out = append(out, p[i])
	}
	f.fail("a string does not end")
	return ""
}

func (f *form) utf8(b []byte) string {
	if !utf8.Valid(b) {
		f.fail("a string is not UTF-8")
	}
	return string(b)
}

// number is not negative.
func (f *form) number(key string, n *int64) {
	f.key(key)
	f.integer(n)
}

func (f *form) integer(n *int64) {
	if !f.reading {
		f.b = strconv.AppendInt(f.b, *n, 10)
		return
	}
	p := f.rest()
	i := 0
	for i < len(p) && p[i] >= '0' && p[i] <= '9' {
		i++
	}
	v, err := strconv.ParseInt(string(p[:min(i, 20)]), 10, 64)
	if f.err == nil && (err != nil || i > 20 || i > 1 && p[0] == '0') {
		f.fail("%q is not a number in decimal", clip(string(p[:min(i+8, len(p))])))
		return
	}
	if f.err == nil {
		*n = v
		f.at += i
	}
}

// stampLayout is a time in a document, in UTC.
const stampLayout = "2006-01-02T15:04:05Z"

func (f *form) time(key string, t *time.Time) {
	s := t.UTC().Format(stampLayout)
	f.text(key, &s)
	if f.reading && f.err == nil {
		v, err := time.Parse(stampLayout, s)
		if err != nil || v.Format(stampLayout) != s {
			f.fail("%s %q is not a time as in 2026-11-22T05:00:00Z", key, clip(s))
			return
		}
		*t = v
	}
}

func (f *form) optionalTime(key string, t *time.Time) {
	if f.present(key, !t.IsZero()) {
		f.time(key, t)
	}
}

func (f *form) name(key string, n *Name) {
	f.key(key)
	f.quotedName(n)
}

func (f *form) quotedName(n *Name) {
	s := n.String()
	f.quoted(&s)
	if f.reading && f.err == nil {
		v, err := ParseName(s)
		if err != nil {
			f.fail("%v", err)
		}
		*n = v
	}
}

func (f *form) base64(key string, b *[]byte) {
	s := base64.StdEncoding.EncodeToString(*b)
	f.text(key, &s)
	if f.reading && f.err == nil {
		v, err := base64.StdEncoding.Strict().DecodeString(s)
		if err != nil {
			f.fail("%s is not base64: %v", key, err)
		}
		*b = v
	}
}

func (f *form) objectSize(o *ObjectSize) {
	f.name("name", &o.Name)
	f.number("size", &o.Size)
}

// object is an object whose fields are those of fill.
func (f *form) object(key string, fill func()) {
	f.key(key)
	f.begin('{')
	fill()
	f.end('}')
}

// elements is an array whose elements are those of element.
func elements[T any](f *form, key string, s *[]T, element func(*T)) {
	f.key(key)
	f.begin('[')
	if f.reading {
		for f.err == nil && !f.ahead("]") && (!f.some || f.ahead(",")) {
			var v T
			f.item()
			element(&v)
			if f.err == nil {
				*s = append(*s, v)
			}
		}
	} else {
		for i := range *s {
			f.item()
			element(&(*s)[i])
		}
	}
	f.end(']')
}

// objects is an array of objects whose fields are those of fill.
func objects[T any](f *form, key string, s *[]T, fill func(*T)) {
	elements(f, key, s, func(v *T) {
		f.begin('{')
		fill(v)
		f.end('}')
	})
}
