package sigv4

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// canonicalRequest is what is signed, in the one form both sides make of it.
func canonicalRequest(r *http.Request, p *parts, body []byte) ([]byte, error) {
	path := r.URL.EscapedPath()
	if path == "" {
		path = "/"
	}
	// Paths with anything that signers escape, once or twice, or normalise do
	// not exist here.
	for _, c := range []byte(path) {
		if !unreserved(c) && c != '/' {
			return nil, refuse(ErrIncomplete, "path %.100q", path)
		}
	}
	if strings.Contains(path, "//") || strings.Contains(path, "/./") || strings.Contains(path, "/../") {
		return nil, refuse(ErrIncomplete, "path %.100q", path)
	}
	query, err := canonicalQuery(r.URL.RawQuery)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	b.WriteString(r.Method + "\n" + path + "\n" + query + "\n")
	for _, h := range p.headers {
		values, err := headerValues(r, h)
		if err != nil {
			return nil, err
		}
		b.WriteString(h + ":" + strings.Join(values, ",") + "\n")
	}
	sum := sha256.Sum256(body)
	payload := hex.EncodeToString(sum[:])
	if given, err := one(r, "X-Amz-Content-Sha256"); err != nil || given != "" && given != payload {
		return nil, refuse(ErrIncomplete, "X-Amz-Content-Sha256 is not the body's digest")
	}
	b.WriteString("\n" + strings.Join(p.headers, ";") + "\n" + payload)
	return b.Bytes(), nil
}

func headerValues(r *http.Request, name string) ([]string, error) {
	var values []string
	switch name {
	case "host":
		values = []string{r.Host} // net/http takes it out of the headers
	case "content-length":
		values = slices.Clone(r.Header.Values(name))
		if len(values) == 0 { // not from the network
			values = []string{strconv.FormatInt(r.ContentLength, 10)}
		}
	case "transfer-encoding", "trailer":
		return nil, refuse(ErrIncomplete, "%q cannot be a signed header", name)
	default:
		values = slices.Clone(r.Header.Values(name))
	}
	if len(values) == 0 {
		return nil, refuse(ErrIncomplete, "the signed header %.100q is not there", name)
	}
	for i, v := range values {
		values[i] = collapse(v)
	}
	return values, nil
}

// collapse trims a header's value and makes runs of spaces one.
func collapse(s string) string {
	s = strings.Trim(s, " \t")
	for strings.Contains(s, "  ") {
		s = strings.ReplaceAll(s, "  ", " ")
	}
	return s
}

// canonicalQuery sorts the query's members by name and value as they are
// escaped by RFC 3986. X-Amz-Signature, which cannot sign itself, is left out.
func canonicalQuery(raw string) (string, error) {
	if raw == "" {
		return "", nil
	}
	var members [][2]string
	for m := range strings.SplitSeq(raw, "&") {
		name, value, _ := strings.Cut(m, "=")
		n, err := url.QueryUnescape(name)
		if err != nil {
			return "", refuse(ErrIncomplete, "the query is malformed")
		}
		v, err := url.QueryUnescape(value)
		if err != nil {
			return "", refuse(ErrIncomplete, "the query is malformed")
		}
		if n == "X-Amz-Signature" {
			continue
		}
		members = append(members, [2]string{escape(n), escape(v)})
	}
	slices.SortFunc(members, func(a, b [2]string) int {
		if c := strings.Compare(a[0], b[0]); c != 0 {
			return c
		}
		return strings.Compare(a[1], b[1])
	})
	var b strings.Builder
	for i, m := range members {
		if i > 0 {
			b.WriteByte('&')
		}
		b.WriteString(m[0] + "=" + m[1])
	}
	return b.String(), nil
}

func unreserved(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c == '-' || c == '_' || c == '.' || c == '~'
}

// escape is RFC 3986's percent-encoding of all but the unreserved.
func escape(s string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for _, c := range []byte(s) {
		if unreserved(c) {
			b.WriteByte(c)
		} else {
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		}
	}
	return b.String()
}
