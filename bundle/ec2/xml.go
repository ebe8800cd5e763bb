package ec2

import (
	"bytes"
	"strconv"
	"unicode/utf8"
)

// The manifest is read by a scanner of its own, because encoding/xml does not
// tell where an element begins and ends exactly enough to verify precisely
// the bytes that are parsed, and knows much of XML that has no business in a
// manifest: every such thing (DOCTYPE, comments, CDATA, processing
// instructions, namespaces, entities) is refused, so that no other reader can
// see another document in the same bytes.

// Limits of what is read. A part takes about 130 bytes of manifest.
const (
	maxManifest = 16 << 20
	maxName     = 40       // of an element or attribute
	maxText     = 64 << 10 // of one element; an RSA-16384 value takes 4 KiB
	maxAttrs    = 4
	maxAttr     = 256    // bytes of an attribute's value
	maxList     = 10_000 // mappings, product codes, ancestors; not parts
)

// A scanner walks the bytes of a document. at is always the next byte.
type scanner struct {
	b     []byte
	at    int
	ascii bool // the declaration says so
}

type attr struct{ name, value string }

// An element is a start tag that has just been read.
type element struct {
	name  string
	attrs []attr
	empty bool // <name/>
	at    int  // offset of its '<'
}

func (s *scanner) errorf(format string, args ...any) error {
	return fail(ErrFormat, objManifest, "at byte "+strconv.Itoa(s.at)+": "+format, args...)
}

func (s *scanner) truncated() error {
	return fail(ErrTruncated, objManifest, "ends after %d bytes, before its end tag", len(s.b))
}

func (s *scanner) rest() []byte { return s.b[s.at:] }

// accept moves on past lit, if that is what comes next.
func (s *scanner) accept(lit string) bool {
	if !bytes.HasPrefix(s.rest(), []byte(lit)) {
		return false
	}
	s.at += len(lit)
	return true
}

func (s *scanner) expect(lit string) error {
	if s.accept(lit) {
		return nil
	}
	if bytes.HasPrefix([]byte(lit), s.rest()) {
		return s.truncated()
	}
	return s.errorf("%q expected", lit)
}

// space skips white space and tells whether there was any.
func (s *scanner) space() bool {
	from := s.at
	for s.at < len(s.b) {
		switch s.b[s.at] {
		case ' ', '\t', '\n', '\r':
			s.at++
		default:
			return s.at > from
		}
	}
	return s.at > from
}

// declaration reads the optional XML declaration. Only encodings that make
// the same bytes mean the same text are accepted.
func (s *scanner) declaration() error {
	for _, bom := range []string{"\xef\xbb\xbf", "\xfe\xff", "\xff\xfe", "\x00", "<\x00"} {
		if bytes.HasPrefix(s.b, []byte(bom)) {
			return s.errorf("begins with a byte order mark or in UTF-16; only ASCII and UTF-8 are read")
		}
	}
	if bytes.HasPrefix([]byte("<?xml"), s.b) { // or nothing at all
		return s.truncated()
	}
	if !s.accept("<?xml") {
		return nil
	}
	seen := 0 // the order is fixed: version, encoding, standalone
	for {
		spaced := s.space()
		if s.accept("?>") {
			if seen == 0 {
				return s.errorf("XML declaration without a version")
			}
			return nil
		}
		if s.at == len(s.b) || string(s.rest()) == "?" {
			return s.truncated()
		}
		if !spaced {
			return s.errorf("malformed XML declaration")
		}
		a, err := s.attribute()
		if err != nil {
			return err
		}
		switch {
		case seen == 0 && a.name == "version" && a.value == "1.0":
			seen = 1
		case seen == 1 && a.name == "encoding" && isOneOfFold(a.value, "utf-8"):
			seen = 2
		case seen == 1 && a.name == "encoding" && isOneOfFold(a.value, "ascii", "us-ascii"):
			seen, s.ascii = 2, true
		case (seen == 1 || seen == 2) && a.name == "standalone" && (a.value == "yes" || a.value == "no"):
			seen = 3
		default:
			return s.errorf("XML declaration with %s=%q", a.name, a.value)
		}
	}
}

func isOneOfFold(v string, of ...string) bool {
	for _, o := range of {
		if bytes.EqualFold([]byte(v), []byte(o)) {
			return true
		}
	}
	return false
}

// name reads the name of an element or attribute. The format's names are
// lower-case letters, digits and underscores; a colon would be a namespace.
func (s *scanner) name() (string, error) {
	from := s.at
	for s.at < len(s.b) {
		c := s.b[s.at]
		if !(c >= 'a' && c <= 'z' || c == '_' || c >= '0' && c <= '9' && s.at > from) {
			break
		}
		if s.at++; s.at-from > maxName {
			return "", s.errorf("name of more than %d bytes", maxName)
		}
	}
	switch {
	case s.at == len(s.b):
		return "", s.truncated()
	case s.b[s.at] == ':':
		return "", s.errorf("namespace prefix %q: none belongs here", s.b[from:s.at])
	case s.at == from:
		return "", s.errorf("name expected, found %q", s.b[s.at])
	}
	return string(s.b[from:s.at]), nil
}

// attribute reads name='value' or name="value"; values need no escapes.
func (s *scanner) attribute() (attr, error) {
	name, err := s.name()
	if err != nil {
		return attr{}, err
	}
	if err := s.expect("="); err != nil {
		return attr{}, err
	}
	if s.at == len(s.b) {
		return attr{}, s.truncated()
	}
	quote := s.b[s.at]
	if quote != '\'' && quote != '"' {
		return attr{}, s.errorf("attribute %s without quotes", name)
	}
	s.at++
	from := s.at
	for s.at < len(s.b) && s.b[s.at] != quote {
		if c := s.b[s.at]; c < ' ' || c > '~' || c == '<' || c == '>' || c == '&' {
			return attr{}, s.errorf("attribute %s contains %q", name, c)
		}
		if s.at++; s.at-from > maxAttr {
			return attr{}, s.errorf("attribute %s is longer than %d bytes", name, maxAttr)
		}
	}
	if s.at == len(s.b) {
		return attr{}, s.truncated()
	}
	s.at++
	return attr{name, string(s.b[from : s.at-1])}, nil
}

// start reads a start tag; '<' comes next.
func (s *scanner) start() (element, error) {
	e := element{at: s.at}
	if err := s.expect("<"); err != nil {
		return e, err
	}
	if s.at == len(s.b) {
		return e, s.truncated()
	}
	switch s.b[s.at] {
	case '!':
		return e, s.errorf("a comment, CDATA section or DOCTYPE: none belongs in a manifest")
	case '?':
		return e, s.errorf("a processing instruction: none belongs in a manifest")
	}
	var err error
	if e.name, err = s.name(); err != nil {
		return e, err
	}
	for {
		switch {
		case s.accept(">"):
			return e, nil
		case s.accept("/>"):
			e.empty = true
			return e, nil
		}
		if !s.accept(" ") {
			if s.at == len(s.b) || bytes.Equal(s.rest(), []byte("/")) {
				return e, s.truncated()
			}
			return e, s.errorf("%q in the tag <%s", s.b[s.at], e.name)
		}
		a, err := s.attribute()
		if err != nil {
			return e, err
		}
		for _, b := range e.attrs {
			if a.name == b.name {
				return e, s.errorf("<%s> has attribute %s twice", e.name, a.name)
			}
		}
		if e.attrs = append(e.attrs, a); len(e.attrs) > maxAttrs {
			return e, s.errorf("<%s> has more than %d attributes", e.name, maxAttrs)
		}
	}
}

// children calls each for every element within e, to which only white space
// may be added, and reads e's end tag. each reads its element completely.
func (s *scanner) children(e element, each func(element) error) error {
	for !e.empty {
		s.space()
		if s.accept("</") {
			return s.expect(e.name + ">")
		}
		if s.at == len(s.b) {
			return s.truncated()
		}
		if s.b[s.at] != '<' {
			return s.errorf("text within <%s>", e.name)
		}
		c, err := s.start()
		if err != nil {
			return err
		}
		if err := each(c); err != nil {
			return err
		}
	}
	return nil
}

// text reads the text of e, which has no elements within, and its end tag.
func (s *scanner) text(e element) (string, error) {
	if e.empty {
		return "", nil
	}
	from := s.at
	var out []byte
	for {
		if s.at == len(s.b) {
			return "", s.truncated()
		}
		if s.at-from > maxText {
			return "", s.errorf("<%s> has more than %d bytes of text", e.name, maxText)
		}
		switch c := s.b[s.at]; {
		case c == '<':
			if err := s.expect("</" + e.name + ">"); err != nil {
				return "", err
			}
			return string(out), nil
		case c == '&':
			r, err := s.reference()
			if err != nil {
				return "", err
			}
			out = utf8.AppendRune(out, r)
		case c >= ' ' && c <= '~' || c == '\n' || c == '\t':
			// "]]>" is not well-formed in text, and ">" never needs to be bare.
			if c == '>' {
				return "", s.errorf("'>' in the text of <%s>", e.name)
			}
			out = append(out, c)
			s.at++
		default:
			r, n := utf8.DecodeRune(s.rest())
			if s.ascii || r == utf8.RuneError && n < 2 || !isChar(r) {
				return "", s.errorf("byte %#02x in the text of <%s>", c, e.name)
			}
			out = append(out, s.rest()[:n]...)
			s.at += n
		}
	}
}

// isChar tells whether XML 1.0 allows r; control characters are refused
// though it would allow those above 0x7f.
func isChar(r rune) bool {
	return r == '\t' || r == '\n' || r >= ' ' && r < 0x7f || r >= 0xa0 && r < 0xd800 || r >= 0xe000 && r < 0xfffe || r >= 0x10000 && r <= 0x10ffff
}

// reference reads one of the five entities or a character reference.
func (s *scanner) reference() (rune, error) {
	end := bytes.IndexByte(s.b[s.at:min(s.at+12, len(s.b))], ';')
	if end < 0 {
		if len(s.b)-s.at < 12 {
			return 0, s.truncated()
		}
		return 0, s.errorf("'&' that is no reference")
	}
	ref := string(s.b[s.at+1 : s.at+end])
	var r rune
	switch ref {
	case "amp":
		r = '&'
	case "lt":
		r = '<'
	case "gt":
		r = '>'
	case "quot":
		r = '"'
	case "apos":
		r = '\''
	default:
		digits, base := ref, 0
		switch {
		case len(ref) > 2 && ref[:2] == "#x":
			digits, base = ref[2:], 16
		case len(ref) > 1 && ref[0] == '#':
			digits, base = ref[1:], 10
		default:
			return 0, s.errorf("entity &%s;", ref)
		}
		n, err := strconv.ParseUint(digits, base, 32)
		if err != nil || n > utf8.MaxRune || !isChar(rune(n)) {
			return 0, s.errorf("character reference &%s;", ref)
		}
		r = rune(n)
	}
	s.at += end + 1
	return r, nil
}

// appendText appends text with the five characters escaped as REXML does.
func appendText(b []byte, text string) []byte {
	for i := 0; i < len(text); i++ {
		switch c := text[i]; c {
		case '&':
			b = append(b, "&amp;"...)
		case '<':
			b = append(b, "&lt;"...)
		case '>':
			b = append(b, "&gt;"...)
		case '"':
			b = append(b, "&quot;"...)
		case '\'':
			b = append(b, "&apos;"...)
		default:
			b = append(b, c)
		}
	}
	return b
}
