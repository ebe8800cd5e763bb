package ec2api

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/instar-image/instar/upload/catalog"
)

// Limits of a request.
const (
	maxBody       = 256 << 10 // bytes
	maxParameters = 5000
	maxName       = 255 // bytes of a parameter's name
)

// params are a request's parameters, each there once, and which of them an
// action took.
type params struct {
	values map[string]string
	taken  map[string]bool
}

// parseParams reads the parameters of query and body. What is there twice is
// refused: two readers might see two requests.
func parseParams(rawQuery string, contentType string, body []byte) (*params, error) {
	p := &params{values: make(map[string]string), taken: make(map[string]bool)}
	if err := p.add(rawQuery); err != nil {
		return nil, err
	}
	if len(body) == 0 {
		return p, nil
	}
	if media, _, _ := strings.Cut(contentType, ";"); !strings.EqualFold(strings.TrimSpace(media), "application/x-www-form-urlencoded") {
		return nil, refuse(codeMalformedQuery, "the body must be application/x-www-form-urlencoded, not %.100q", contentType)
	}
	return p, p.add(string(body))
}

func (p *params) add(raw string) error {
	for m := range strings.SplitSeq(raw, "&") {
		if m == "" {
			continue
		}
		n, v, _ := strings.Cut(m, "=")
		name, err := url.QueryUnescape(n)
		if err != nil {
			return refuse(codeMalformedQuery, "a parameter's name is malformed")
		}
		value, err := url.QueryUnescape(v)
		if err != nil || !utf8.ValidString(value) {
			return refuse(codeMalformedQuery, "the value of %.100q is malformed or not UTF-8", name)
		}
		_, twice := p.values[name]
		switch {
		case name == "" || len(name) > maxName || !utf8.ValidString(name):
			return refuse(codeMalformedQuery, "a parameter's name is empty, overlong or not UTF-8")
		case twice:
			return refuse(codeMalformedQuery, "the parameter %q is there twice", name)
		case len(p.values) == maxParameters:
			return refuse(codeMalformedQuery, "there are more than %d parameters", maxParameters)
		}
		p.values[name] = value
	}
	return nil
}

// get takes a parameter.
func (p *params) get(name string) (string, bool) {
	v, ok := p.values[name]
	if ok {
		p.taken[name] = true
	}
	return v, ok
}

// frame are the parameters of every request, beside those of its action.
var frame = []string{
	"Action", "Version", "X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders",
	"X-Amz-Signature", "X-Amz-Security-Token", "AWSAccessKeyId", "SignatureVersion", "SignatureMethod", "Timestamp", "Expires",
}

// unknown names a parameter that no one took, the first by name.
func (p *params) unknown() error {
	var left []string
	for name := range p.values {
		if !p.taken[name] && !slices.Contains(frame, name) {
			left = append(left, name)
		}
	}
	if len(left) == 0 {
		return nil
	}
	return refuse(codeUnknownParameter, "the parameter %.255q is not recognized", slices.Min(left))
}

// versions are the API versions whose namespace is echoed.
const (
	newest     = "2016-11-15"
	versionSTS = "2011-06-15"
)

// version is the API version a request asks for: any that looks like one, for
// clients do not look at what comes back.
func version(s string) (string, error) {
	if s == "" {
		return newest, nil
	}
	if len(s) != 10 || s[4] != '-' || s[7] != '-' || strings.Trim(s, "0123456789-") != "" {
		return "", refuse(codeNoSuchVersion, "the version %.40q is not a date such as %s", s, newest)
	}
	return s, nil
}

// methodAllowed is for requests that are not of this protocol at all.
func methodAllowed(r *http.Request) error {
	switch {
	case r.URL.Path != "/" && r.URL.Path != "":
		return refuse(codeNotFound, "there is nothing at this path: the endpoint is /")
	case r.Method != http.MethodPost && r.Method != http.MethodGet:
		return refuse(codeMethod, "the method must be POST or GET")
	}
	return nil
}

// missing is the error for a parameter that must be there.
func missing(name string) error {
	return refuse(catalog.CodeMissing, "the request must contain the parameter %s", name)
}
