package metadata

import (
	"net/http"
	"strconv"
	"time"
)

// checkToken answers the request itself, and returns false, if its token is
// wrong or needed and missing.
func (e *exchange) checkToken(required bool) bool {
	values := e.r.Header["X-Aws-Ec2-Metadata-Token"]
	e.rep.Token = "none"
	for _, v := range values[min(1, len(values)):] {
		if v != values[0] {
			e.rep.Token = "bad"
			e.fail(http.StatusBadRequest, "two different tokens")
			return false
		}
	}
	if len(values) == 0 {
		if required {
			e.fail(http.StatusUnauthorized, "token missing")
		}
		return !required
	}
	if !e.h.mint.validOn(e.conn, e.h.state.TokenKeys(), values[0], e.in, e.live.Generation, e.rep.Start) {
		e.rep.Token = "bad"
		e.fail(http.StatusUnauthorized, "token wrong, expired or another instance's")
		return false
	}
	e.rep.Token = "valid"
	return true
}

// tokenRequest answers requests for a token, for whatever version.
func (e *exchange) tokenRequest(version string) {
	h := e.w.Header()
	switch e.r.Method {
	case http.MethodPut:
	case http.MethodOptions:
		h.Set("Allow", "OPTIONS, PUT")
		e.reply(http.StatusOK, e.h.plain, "")
		return
	default:
		h.Set("Allow", "OPTIONS, PUT")
		e.fail(http.StatusMethodNotAllowed, "")
		return
	}
	// The answer must not travel further than the record allows, and nothing
	// else may follow on the connection with that limit.
	h["Connection"] = e.h.closing
	if e.conn != nil {
		if err := e.conn.setHopLimit(e.in.Metadata.HopLimit); err != nil {
			e.fail(http.StatusInternalServerError, "setting the hop limit: "+err.Error())
			return
		}
	}
	if _, ok := e.r.Header["X-Forwarded-For"]; ok {
		e.fail(http.StatusForbidden, "token asked for through a proxy (X-Forwarded-For)")
		return
	}
	if version != "latest" {
		if !known(version) {
			e.fail(http.StatusNotFound, "")
			return
		}
		e.fail(http.StatusForbidden, "tokens are below latest only")
		return
	}
	ttls := e.r.Header["X-Aws-Ec2-Metadata-Token-Ttl-Seconds"]
	if len(ttls) != 1 {
		e.fail(http.StatusBadRequest, "one ttl header is needed")
		return
	}
	ttl, err := strconv.ParseUint(ttls[0], 10, 16)
	if err != nil || ttl < 1 || ttl > 21600 {
		e.fail(http.StatusBadRequest, "the ttl is not 1 to 21600")
		return
	}
	h["X-Aws-Ec2-Metadata-Token-Ttl-Seconds"] = []string{strconv.FormatUint(ttl, 10)}
	e.rep.Token = "issued"
	e.reply(http.StatusOK, e.h.plain,
		e.h.mint.mint(e.h.state.TokenKeys()[0], e.in, e.live.Generation, e.rep.Start, time.Duration(ttl)*time.Second))
}
