package s3fault

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"strings"
	"time"
)

// Fault is one way in which a request to S3 goes wrong.
type Fault string

// The faults. "Applied" ones reach the server, whose reply is then damaged;
// the others never get there, if not said otherwise.
const (
	None Fault = ""

	Status500    Fault = "status-500"
	SlowDown     Fault = "slow-down"     // 503 with Retry-After
	TooMany      Fault = "too-many"      // 429
	Expired      Fault = "expired-token" // 403
	Skewed       Fault = "clock-skew"    // 403
	Refused      Fault = "refused"       // 403 AccessDenied
	NotFound     Fault = "not-found"     // 404
	Redirect301  Fault = "redirect-301"  // to Proxy.Elsewhere
	Redirect307  Fault = "redirect-307"  // to Proxy.Elsewhere
	Error200     Fault = "error-in-200"  // 200 whose body is an <Error>
	ResetFirst   Fault = "reset-first"   // before anything is read
	ResetRequest Fault = "reset-request" // amid the request's body
	StallRequest Fault = "stall-request" // the request's body is not read
	RefuseExpect Fault = "refuse-expect" // 417 instead of 100 Continue
	HTML502      Fault = "html-502"      // a proxy's page instead of XML
	EmptyReply   Fault = "empty-reply"   // 200 without body and headers

	LostReply    Fault = "lost-reply"       // applied, then reset before the headers
	ResetHeaders Fault = "reset-headers"    // applied, reset after the headers
	ResetBody    Fault = "reset-body"       // applied, reset amid the body
	Truncated    Fault = "truncated"        // applied, body closed early
	Shorter      Fault = "shorter"          // applied, less body and a length that agrees
	Longer       Fault = "longer"           // applied, more body than the length says
	StallReply   Fault = "stall-reply"      // applied, no reply
	StallBody    Fault = "stall-body"       // applied, body stops
	Trickle      Fault = "trickle"          // applied, body byte by byte
	WrongBytes   Fault = "wrong-bytes"      // applied, one bit of the body flipped (objects only)
	WrongETag    Fault = "wrong-etag"       // applied
	MissingETag  Fault = "missing-etag"     // applied
	NoLength     Fault = "no-length"        // applied, body chunked
	Gzipped      Fault = "gzipped"          // applied, body compressed unasked
	Duplicated   Fault = "duplicated"       // applied, reply sent twice
	Applied500   Fault = "applied-500"      // applied, answered with 500
	AppliedHTML  Fault = "applied-html-502" // applied, answered with a proxy's page
)

// All lists every fault but None.
func All() []Fault {
	return []Fault{
		Status500, SlowDown, TooMany, Expired, Skewed, Refused, NotFound, Redirect301, Redirect307, Error200, ResetFirst,
		ResetRequest, StallRequest, RefuseExpect, HTML502, EmptyReply, LostReply, ResetHeaders, ResetBody, Truncated, Shorter,
		Longer, StallReply, StallBody, Trickle, WrongBytes, WrongETag, MissingETag, NoLength, Gzipped, Duplicated, Applied500, AppliedHTML,
	}
}

// Permanent tells whether a client may give up after the fault has occurred
// once: what it says is an answer, not a disturbance.
func (f Fault) Permanent() bool {
	switch f {
	case Refused, NotFound, Redirect301:
		return true
	}
	return false
}

// Applied tells whether the request reaches the server.
func (f Fault) Applied() bool {
	switch f {
	case None, LostReply, ResetHeaders, ResetBody, Truncated, Shorter, Longer, StallReply, StallBody, Trickle, WrongBytes,
		WrongETag, MissingETag, NoLength, Gzipped, Duplicated, Applied500, AppliedHTML:
		return true
	}
	return false
}

// reply is what goes over the wire.
type reply struct {
	status int
	header http.Header
	body   []byte
	length int // of Content-Length; -1: chunked
}

func errorReply(status int, code, message string) *reply {
	body := []byte(`<?xml version="1.0" encoding="UTF-8"?>` + "\n<Error><Code>" + code + "</Code><Message>" + message +
		"</Message><RequestId>FAULT</RequestId></Error>")
	return &reply{status: status, header: http.Header{"Content-Type": {"application/xml"}, "X-Amz-Request-Id": {"FAULT"}}, body: body, length: len(body)}
}

func htmlReply() *reply {
	body := []byte("<html><body><h1>502 Bad Gateway</h1></body></html>\n")
	return &reply{status: 502, header: http.Header{"Content-Type": {"text/html"}}, body: body, length: len(body)}
}

// instead is the reply of a fault that does not reach the server; nil for the
// ones that have none.
func (p *Proxy) instead(f Fault, r *http.Request) *reply {
	switch f {
	case Status500:
		return errorReply(500, "InternalError", "We encountered an internal error. Please try again.")
	case SlowDown:
		e := errorReply(503, "SlowDown", "Please reduce your request rate.")
		e.header.Set("Retry-After", "1")
		return e
	case TooMany:
		return errorReply(429, "TooManyRequests", "Please reduce your request rate.")
	case Expired:
		return errorReply(403, "ExpiredToken", "The provided token has expired.")
	case Skewed:
		e := errorReply(403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.")
		e.header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
		return e
	case Refused:
		return errorReply(403, "AccessDenied", "Access Denied.")
	case NotFound:
		return errorReply(404, "NoSuchKey", "The specified key does not exist.")
	case Redirect301, Redirect307:
		e := errorReply(301, "PermanentRedirect", "The bucket you are attempting to access must be addressed using the specified endpoint.")
		if f == Redirect307 {
			e = errorReply(307, "TemporaryRedirect", "Please re-send this request to the specified temporary endpoint.")
		}
		e.header.Set("Location", p.Elsewhere+r.URL.RequestURI())
		return e
	case Error200:
		e := errorReply(200, "InternalError", "We encountered an internal error. Please try again.")
		return e
	case RefuseExpect:
		return &reply{status: 417, header: http.Header{}, length: 0}
	case HTML502:
		return htmlReply()
	case EmptyReply:
		return &reply{status: 200, header: http.Header{}, length: 0}
	}
	return nil
}

// damage changes a server's reply; the faults of the connection come later.
func (f Fault) damage(r *reply) *reply {
	switch f {
	case Shorter:
		if len(r.body) > 0 {
			r.body = r.body[:len(r.body)/2]
			r.length = len(r.body)
		}
	case Longer:
		r.body = append(r.body, "and some more that nobody announced"...)
	case WrongBytes:
		if n := len(r.body); n > 0 && !strings.Contains(r.header.Get("Content-Type"), "xml") {
			r.body = bytes.Clone(r.body)
			r.body[n/2] ^= 0x10
		}
	case WrongETag:
		if r.header.Get("Etag") != "" {
			r.header.Set("Etag", `"00000000000000000000000000000bad"`)
		}
	case MissingETag:
		r.header.Del("Etag")
	case NoLength:
		r.length = -1
	case Gzipped:
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write(r.body)
		z.Close()
		r.body, r.length = b.Bytes(), b.Len()
		r.header.Set("Content-Encoding", "gzip")
	case Applied500:
		return errorReply(500, "InternalError", "We encountered an internal error. Please try again.")
	case AppliedHTML:
		return htmlReply()
	}
	return r
}
