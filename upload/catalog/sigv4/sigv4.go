// Package sigv4 verifies requests signed with AWS Signature Version 4, in the
// Authorization header or, presigned, in the query.
//
// What goes in: a request as it was received, its body, and who knows the
// secrets. What comes out: whose key signed it, or an [*Error] that says what
// is wrong. The package touches nothing and keeps nothing.
//
// The AWS SDK signs and does not verify. The algorithm is that of "Create a
// signed AWS API request" in the IAM User Guide. Nothing of the request that is
// acted upon stays outside the signature: method, path, query, host, content
// type, every x-amz- header, and the body, whose digest is always computed and
// never taken from a header.
package sigv4

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Window is how far a request's time may be from the verifier's.
const Window = 5 * time.Minute

// MaxExpires is the longest a presigned request is good for.
const MaxExpires = 7 * 24 * time.Hour

const (
	algorithm  = "AWS4-HMAC-SHA256"
	terminator = "aws4_request"
	timeLayout = "20060102T150405Z"

	maxHeader = 8 << 10 // bytes of an Authorization header, and of a token
)

// Kinds of refusal, for errors.Is.
var (
	ErrMissing    = errors.New("the request is not signed")
	ErrIncomplete = errors.New("the signature is incomplete or malformed")
	ErrExpired    = errors.New("the presigned request is not good any more")
	ErrSkew       = errors.New("the request's time is not now")
	ErrScope      = errors.New("the request is signed for another service or region")
	ErrSignature  = errors.New("the key or the signature is not right") // one does not tell which
)

// Error is a refused request. Its text holds no secret, and nothing that would
// tell a key that exists from one that does not.
type Error struct {
	Kind   error // one of the sentinels
	Detail string
}

func (e *Error) Error() string { return e.Kind.Error() + ": " + e.Detail }

func (e *Error) Unwrap() error { return e.Kind }

func refuse(kind error, format string, args ...any) *Error {
	return &Error{kind, fmt.Sprintf(format, args...)}
}

// Key is an access key as whoever verifies knows it.
type Key struct {
	ID      string
	Secret  string
	Token   string    // the session token that must come with it, "" for none
	Expires time.Time // when it ends; zero for never
}

// String shows the key's id alone.
func (k Key) String() string { return "key " + k.ID }

// GoString is String: %#v shows no secret either.
func (k Key) GoString() string { return k.String() }

// Verifier verifies requests. Its methods may be called concurrently.
type Verifier struct {
	// Key finds a key by its id; false if there is none.
	Key func(id string) (Key, bool)
	// Scope says whether requests for a region and service are taken.
	Scope func(region, service string) bool
	// Now is the clock; nil for time.Now.
	Now func() time.Time
}

// Signed is a request whose signature is good.
type Signed struct {
	KeyID   string
	Region  string
	Service string
	Time    time.Time
}

// parts are what a request says of its signature.
type parts struct {
	keyID, date, region, service string
	headers                      []string
	signature                    []byte
	at                           time.Time
	expires                      time.Duration // of a presigned request; 0 in a header
	token                        string
}

// Verify checks the signature of r, whose body has been read. The error is an
// *Error.
func (v *Verifier) Verify(r *http.Request, body []byte) (Signed, error) {
	p, err := parse(r)
	if err != nil {
		return Signed{}, err
	}
	if !v.Scope(p.region, p.service) {
		return Signed{}, refuse(ErrScope, "credential scope %q", p.date+"/"+p.region+"/"+p.service)
	}
	now := time.Now
	if v.Now != nil {
		now = v.Now
	}
	if err := p.checkTime(now()); err != nil {
		return Signed{}, err
	}
	canonical, err := canonicalRequest(r, p, body)
	if err != nil {
		return Signed{}, err
	}
	key, known := v.Key(p.keyID)
	if !known {
		key = Key{Secret: "the same work is done for a key that does not exist"}
	}
	want := sign(key.Secret, p, canonical)
	good := subtle.ConstantTimeCompare(want, p.signature)
	good &= subtle.ConstantTimeCompare(digest(key.Token), digest(p.token))
	if good != 1 || !known {
		return Signed{}, refuse(ErrSignature, "check the access key, its secret, the session token and the clock")
	}
	if !key.Expires.IsZero() && !now().Before(key.Expires) {
		return Signed{}, refuse(ErrSignature, "the access key ended at %s", key.Expires.UTC().Format(time.RFC3339))
	}
	return Signed{KeyID: p.keyID, Region: p.region, Service: p.service, Time: p.at}, nil
}

func digest(s string) []byte {
	sum := sha256.Sum256([]byte(s))
	return sum[:]
}

func (p *parts) checkTime(now time.Time) error {
	presigned := p.expires > 0
	switch {
	case presigned && now.After(p.at.Add(p.expires)):
		return refuse(ErrExpired, "it is of %s, good for %s, and here it is %s", p.at.Format(timeLayout), p.expires, now.UTC().Format(timeLayout))
	case now.Before(p.at.Add(-Window)), !presigned && now.After(p.at.Add(Window)):
		return refuse(ErrSkew, "it is of %s, and here it is %s: check the clock", p.at.Format(timeLayout), now.UTC().Format(timeLayout))
	}
	return nil
}

// sign computes the signature of a canonical request.
func sign(secret string, p *parts, canonical []byte) []byte {
	sum := sha256.Sum256(canonical)
	toSign := algorithm + "\n" + p.at.Format(timeLayout) + "\n" +
		p.date + "/" + p.region + "/" + p.service + "/" + terminator + "\n" + hex.EncodeToString(sum[:])
	key := []byte("AWS4" + secret)
	for _, s := range []string{p.date, p.region, p.service, terminator, toSign} {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(s))
		key = h.Sum(nil)
	}
	return key
}

// mustSign checks that nothing that counts is outside the signed headers.
func mustSign(r *http.Request, p *parts) error {
	need := []string{"host"}
	for name := range r.Header {
		l := strings.ToLower(name)
		if l == "content-type" || strings.HasPrefix(l, "x-amz-") {
			need = append(need, l)
		}
	}
	if p.expires == 0 {
		need = append(need, "x-amz-date")
	}
	for _, n := range need {
		if !slices.Contains(p.headers, n) {
			return refuse(ErrIncomplete, "%q must be a signed header; signed are %q", n, strings.Join(p.headers, ";"))
		}
	}
	return nil
}
