package cache

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// FuzzByteRange: what is answered lies within the object, and is what net/http
// makes of the same header where both answer one range.
func FuzzByteRange(f *testing.F) {
	for _, s := range []string{"", "bytes=0-0", "bytes=5-", "bytes=-5", "bytes=0-1,3-4", "bytes=9-1", "items=0-1", "bytes=-", "bytes=1-99999999999999999999", "bytes= 1-2 "} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		size = 1 + (size%1000+1000)%1000
		off, n, whole := byteRange(header, size)
		if off < 0 || n < 0 || off > size || n > size-off || whole && (off != 0 || n != size) {
			t.Fatalf("%q of %d: %d bytes from %d, whole %v", header, size, n, off, whole)
		}
		if whole || n == 0 {
			return
		}
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("Range", header)
		w := httptest.NewRecorder()
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(make([]byte, size)))
		if w.Code == http.StatusPartialContent && int64(w.Body.Len()) != n {
			t.Fatalf("%q of %d: %d bytes, net/http gives %d", header, size, n, w.Body.Len())
		}
	})
}
