package metadata

import (
	"context"
	"io"
	"net/http"
	"strconv"
)

type noteKey struct{}

func withNote(ctx context.Context, note *string) context.Context {
	return context.WithValue(ctx, noteKey{}, note)
}

// Note adds a remark to the report of the request that ctx belongs to. Only
// the goroutine that serves the request may call it.
func Note(ctx context.Context, text string) {
	if n, ok := ctx.Value(noteKey{}).(*string); ok {
		*n = text
	}
}

func (e *exchange) fail(status int, note string) {
	e.rep.Note = note
	e.reply(status, e.h.html, e.h.pages[status])
}

func (e *exchange) reply(status int, ctype []string, body string) {
	if !e.head(status, ctype, len(body)) {
		return
	}
	_, err := io.WriteString(e.w, body)
	e.sent(err)
}

func (e *exchange) replyBytes(status int, ctype []string, body []byte) {
	if !e.head(status, ctype, len(body)) {
		return
	}
	_, err := e.w.Write(body)
	e.sent(err)
}

// head sends the header and reports whether a body of n bytes is to follow.
func (e *exchange) head(status int, ctype []string, n int) bool {
	h := e.w.Header()
	h["Content-Type"] = ctype
	if n < len(e.h.lengths) {
		h["Content-Length"] = e.h.lengths[n]
	} else {
		h["Content-Length"] = []string{strconv.Itoa(n)}
	}
	e.rep.Status = status
	e.w.WriteHeader(status)
	if e.r.Method == http.MethodHead {
		return false
	}
	e.rep.Bytes = n
	return true
}

func (e *exchange) sent(err error) {
	if err != nil && e.rep.Note == "" {
		e.rep.Note = "the client went away"
	}
}
