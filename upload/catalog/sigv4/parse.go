package sigv4

import (
	"encoding/hex"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Presigned says whether the request carries its signature in the query.
func Presigned(r *http.Request) bool { return strings.Contains(r.URL.RawQuery, "X-Amz-Signature=") }

// parse reads what a request says of its signature. The forms cannot be mixed.
func parse(r *http.Request) (*parts, error) {
	authorization := r.Header.Values("Authorization")
	switch {
	case len(authorization) > 1:
		return nil, refuse(ErrIncomplete, "%d Authorization headers", len(authorization))
	case len(authorization) == 1 && strings.Contains(r.URL.RawQuery, "X-Amz-"):
		return nil, refuse(ErrIncomplete, "a signature in the header and one in the query")
	case len(authorization) == 1:
		return parseHeader(r, authorization[0])
	case Presigned(r):
		return parseQuery(r)
	}
	return nil, refuse(ErrMissing, "it has neither an Authorization header nor X-Amz-Signature in the query")
}

func parseHeader(r *http.Request, s string) (*parts, error) {
	rest, ok := strings.CutPrefix(s, algorithm+" ")
	if !ok || len(s) > maxHeader {
		return nil, refuse(ErrIncomplete, "the Authorization header is not one of %s", algorithm)
	}
	fields := map[string]string{}
	for f := range strings.SplitSeq(rest, ",") {
		name, value, ok := strings.Cut(strings.Trim(f, " "), "=")
		if _, twice := fields[name]; !ok || twice || value == "" {
			return nil, refuse(ErrIncomplete, "the Authorization header has %q", f)
		}
		fields[name] = value
	}
	for _, name := range []string{"Credential", "SignedHeaders", "Signature"} {
		if fields[name] == "" {
			return nil, refuse(ErrIncomplete, "the Authorization header has no %s", name)
		}
	}
	if len(fields) != 3 {
		return nil, refuse(ErrIncomplete, "the Authorization header has %d members, not 3", len(fields))
	}
	date, err := one(r, "X-Amz-Date")
	if err != nil {
		return nil, err
	}
	token, err := one(r, "X-Amz-Security-Token")
	if err != nil {
		return nil, err
	}
	return complete(r, fields["Credential"], fields["SignedHeaders"], fields["Signature"], date, token, 0)
}

// one is a header that may be there once.
func one(r *http.Request, name string) (string, error) {
	switch v := r.Header.Values(name); {
	case len(v) == 0:
		return "", nil
	case len(v) > 1 || len(v[0]) > maxHeader:
		return "", refuse(ErrIncomplete, "%s is there %d times, or too long", name, len(v))
	default:
		return v[0], nil
	}
}

func parseQuery(r *http.Request) (*parts, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, refuse(ErrIncomplete, "the query is malformed")
	}
	get := func(name string) string {
		if len(q[name]) != 1 || len(q[name][0]) > maxHeader {
			return ""
		}
		return q[name][0]
	}
	for name, values := range q {
		if strings.HasPrefix(name, "X-Amz-") && len(values) != 1 {
			return nil, refuse(ErrIncomplete, "%q is in the query %d times", name, len(values))
		}
	}
	if get("X-Amz-Algorithm") != algorithm {
		return nil, refuse(ErrIncomplete, "X-Amz-Algorithm is not %s", algorithm)
	}
	expires := Window // the SDKs presign requests of STS without saying for how long
	if text, said := q["X-Amz-Expires"]; said {
		seconds, err := strconv.ParseUint(text[0], 10, 32)
		if expires = time.Duration(seconds) * time.Second; err != nil || expires < time.Second || expires > MaxExpires {
			return nil, refuse(ErrIncomplete, "X-Amz-Expires is %.40q, not 1 to %d seconds", text[0], MaxExpires/time.Second)
		}
	}
	return complete(r, get("X-Amz-Credential"), get("X-Amz-SignedHeaders"), get("X-Amz-Signature"), get("X-Amz-Date"), get("X-Amz-Security-Token"), expires)
}

func complete(r *http.Request, credential, headers, signature, date, token string, expires time.Duration) (*parts, error) {
	p := &parts{expires: expires, token: token}
	scope := strings.Split(credential, "/")
	if len(scope) != 5 || scope[4] != terminator {
		return nil, refuse(ErrIncomplete, "the credential %.200q is not KEY/DATE/REGION/SERVICE/%s", credential, terminator)
	}
	for _, s := range scope {
		if s == "" || len(s) > 128 {
			return nil, refuse(ErrIncomplete, "the credential %.200q has an empty or overlong member", credential)
		}
	}
	p.keyID, p.date, p.region, p.service = scope[0], scope[1], scope[2], scope[3]
	var err error
	if p.at, err = time.Parse(timeLayout, date); err != nil || p.at.Format(timeLayout) != date {
		return nil, refuse(ErrIncomplete, "the time %.40q is not one like %s", date, timeLayout)
	}
	if date[:8] != p.date {
		return nil, refuse(ErrIncomplete, "the credential is of %s and the request of %s", p.date, date)
	}
	if p.signature, err = hex.DecodeString(signature); err != nil || len(p.signature) != 32 || strings.ToLower(signature) != signature {
		return nil, refuse(ErrIncomplete, "the signature is not 64 digits of lower-case hex")
	}
	p.headers = strings.Split(headers, ";")
	for i, h := range p.headers {
		if h == "" || h != strings.ToLower(h) || strings.ContainsAny(h, " \t:,") {
			return nil, refuse(ErrIncomplete, "signed header %.100q", h)
		}
		if i > 0 && p.headers[i-1] >= h {
			return nil, refuse(ErrIncomplete, "the signed headers are not sorted, or one is there twice")
		}
	}
	return p, mustSign(r, p)
}
