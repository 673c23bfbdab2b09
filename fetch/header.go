package fetch

import (
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Device is what the pull client of Mongoose OS tells an update server of itself
// (mongoose-os-libs/ota-http-client, src/mgos_ota_http_client.c). A server may
// choose the firmware by it, or answer that there is nothing newer. In the
// headers whatever is not printable ASCII becomes a question mark, and what is
// longer than 128 bytes is cut.
type Device struct {
	ID        string // X-MGOS-Device-ID, before the MAC; "-" if empty
	MAC       string // hardware address without separators
	App       string // name of the running firmware
	Version   string
	BuildID   string
	Platform  string
	OSVersion string
}

// set adds the headers, in which a field must not look like two.
func (d *Device) set(h http.Header) {
	if d == nil {
		return
	}
	id := headerText(d.ID)
	if id == "" {
		id = "-"
	}
	h.Set("X-MGOS-Device-ID", id+" "+headerText(d.MAC))
	h.Set("User-Agent", fmt.Sprintf("%s/%s (MongooseOS/%s; %s)",
		headerText(d.App), headerText(d.Version), headerText(d.OSVersion), headerText(d.Platform)))
	h.Set("X-MGOS-FW-Version", fmt.Sprintf("%s %s %s", headerText(d.Platform), headerText(d.Version), headerText(d.BuildID)))
}

func headerText(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), 128)]
}

// rangeHeader returns the value of Range for the bytes from off to end, or to the
// last one if end is less than 0.
func rangeHeader(off, end int64) string {
	s := "bytes=" + strconv.FormatInt(off, 10) + "-"
	if end >= 0 {
		s += strconv.FormatInt(end-1, 10)
	}
	return s
}

// contentRange is a header Content-Range (RFC 9110, section 14.4): the bytes from
// off to end, of size. size is -1 if it is not told; off and end are -1 in the
// answer to a range that cannot be satisfied.
type contentRange struct{ off, end, size int64 }

func parseContentRange(s string) (c contentRange, ok bool) {
	unit, s, ok := strings.Cut(s, " ")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return c, false
	}
	at, size, ok := strings.Cut(s, "/")
	if !ok {
		return c, false
	}
	c = contentRange{-1, -1, -1}
	if size != "*" {
		if c.size, ok = decimal(size); !ok {
			return c, false
		}
	}
	if at == "*" {
		return c, c.size >= 0
	}
	first, last, ok := strings.Cut(at, "-")
	if !ok {
		return c, false
	}
	var ok1, ok2 bool
	c.off, ok1 = decimal(first)
	c.end, ok2 = decimal(last)
	if !ok1 || !ok2 || c.off > c.end || c.end == math.MaxInt64 || c.size >= 0 && c.end >= c.size {
		return c, false
	}
	c.end++
	return c, true
}

// decimal parses digits, and nothing but digits.
func decimal(s string) (int64, bool) {
	if strings.ContainsFunc(s, func(r rune) bool { return r < '0' || r > '9' }) {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// retryAfter parses a header Retry-After (RFC 9110, section 10.2.3), a number of
// seconds or a date; 0 if there is none that means anything.
func retryAfter(s string, now time.Time) time.Duration {
	if n, ok := decimal(s); ok {
		return time.Duration(min(n, math.MaxInt64/int64(time.Second))) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(0, t.Sub(now))
	}
	return 0
}

// entity is what an answer tells of the file that it is about, or a part of.
type entity struct {
	etag     string
	modified string // Last-Modified
	size     int64  // -1 if not told
	ifRange  string // its strong validator, "" if it has none
}

func entityOf(res *http.Response, size int64) entity {
	e := entity{res.Header.Get("ETag"), res.Header.Get("Last-Modified"), size, ""}
	if e.etag != "" {
		if len(e.etag) >= 2 && e.etag[0] == '"' && e.etag[len(e.etag)-1] == '"' {
			e.ifRange = e.etag
		}
		return e
	}
	// A date is a strong validator if it was past when the answer was made
	// (RFC 9110, section 8.8.2.2).
	m, err := http.ParseTime(e.modified)
	d, derr := http.ParseTime(res.Header.Get("Date"))
	if err == nil && derr == nil && d.Sub(m) >= time.Second {
		e.ifRange = e.modified
	}
	return e
}

// resumable reports whether later answers can be recognised to be about e.
func (e *entity) resumable() bool { return e.ifRange != "" || e.size >= 0 }

// differs reports whether o is certainly about something else.
func (e *entity) differs(o *entity) bool {
	if e.size >= 0 && o.size >= 0 && e.size != o.size {
		return true
	}
	if e.etag != "" && o.etag != "" {
		return strings.TrimPrefix(e.etag, "W/") != strings.TrimPrefix(o.etag, "W/")
	}
	return e.modified != "" && o.modified != "" && e.modified != o.modified
}

// is reports whether o is, to all appearances, the whole of e again.
func (e *entity) is(o *entity) bool {
	switch {
	case e.differs(o):
		return false
	case e.ifRange != "":
		return e.ifRange == o.ifRange
	}
	return e.size >= 0 && e.size == o.size
}
