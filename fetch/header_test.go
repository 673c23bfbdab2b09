package fetch

import (
	"fmt"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestContentRange(t *testing.T) {
	for s, want := range map[string]contentRange{
		"bytes 0-0/1":                     {0, 1, 1},
		"bytes 5-9/*":                     {5, 10, -1},
		"Bytes 5-9/10":                    {5, 10, 10},
		"bytes */0":                       {-1, -1, 0},
		"bytes 0-9223372036854775806/*":   {0, math.MaxInt64, -1},
		"bytes 1-2/9223372036854775807":   {1, 3, math.MaxInt64},
		"bytes 0000000000000000000001-2/": {},
	} {
		got, ok := parseContentRange(s)
		require.Equal(t, want != contentRange{}, ok, s)
		if ok {
			require.Equal(t, want, got, s)
		}
	}
	for _, s := range []string{
		"", "bytes", "bytes ", "bytes /", "bytes -/", "bytes -1/2", "bytes 1-/2", "bytes 1/2", "bytes 2-1/5", "bytes 0-5/5", "bytes */*",
		"bytes 0-1/-1", "bytes 0--1/5", "bytes +0-1/5", "bytes 0-1/5 ", "bytes  0-1/5", "bytes 0 - 1/5", "bytes=0-1/5", "lines 0-1/5",
		"bytes 0x0-1/5", "bytes 0-9223372036854775807/*", "bytes 0-99999999999999999999/*", "bytes 0-1/5,bytes 0-1/5", "bytes 0-1/5\n", "bytes ٠-1/5",
	} {
		_, ok := parseContentRange(s)
		require.False(t, ok, s)
	}
}

// What is understood is understood as it is written.
func FuzzContentRange(f *testing.F) {
	f.Add("bytes 0-0/1")
	f.Add("bytes */5")
	f.Add("bytes 5-9/*")
	f.Add("bytes 0-9223372036854775807/*")
	f.Add("bytes 18446744073709551616-1/5")
	f.Fuzz(func(t *testing.T, s string) {
		c, ok := parseContentRange(s)
		if !ok {
			return
		}
		size, at := "*", "*"
		if c.size >= 0 {
			size = fmt.Sprint(c.size)
		}
		if c.off >= 0 {
			require.Less(t, c.off, c.end)
			require.True(t, c.size < 0 || c.end <= c.size)
			at = fmt.Sprintf("%d-%d", c.off, c.end-1)
		} else {
			require.Equal(t, contentRange{-1, -1, c.size}, c)
			require.GreaterOrEqual(t, c.size, int64(0))
		}
		again, ok := parseContentRange("bytes " + at + "/" + size)
		require.True(t, ok)
		require.Equal(t, c, again)
		zeros := func(s string) string {
			for strings.Contains(s, " 0") || strings.Contains(s, "-0") || strings.Contains(s, "/0") {
				s = strings.NewReplacer(" 0", " ", "-0", "-", "/0", "/").Replace(s)
			}
			return s
		}
		require.Equal(t, zeros("bytes "+at+"/"+size), zeros("bytes"+s[5:]))
	})
}

func TestRetryAfterHeader(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Duration{
		"": 0, "x": 0, "-1": 0, "1.5": 0, "0": 0, "7": 7 * time.Second,
		"9223372036854775807":           math.MaxInt64 / time.Second * time.Second,
		"9223372036854775808":           0,
		"Thu, 01 Jan 2026 00:01:00 GMT": time.Minute,
		"Wed, 31 Dec 2025 00:00:00 GMT": 0,
	} {
		require.Equal(t, want, retryAfter(s, now), s)
	}
}

func TestDevice(t *testing.T) {
	var none *Device
	h := http.Header{}
	none.set(h)
	require.Empty(t, h)
	(&Device{MAC: "240AC4123456", App: "demo", Version: "1.0", BuildID: "x", Platform: "esp32", OSVersion: "2.19.1"}).set(h)
	require.Equal(t, http.Header{
		"X-Mgos-Device-Id":  {"- 240AC4123456"},
		"User-Agent":        {"demo/1.0 (MongooseOS/2.19.1; esp32)"},
		"X-Mgos-Fw-Version": {"esp32 1.0 x"},
	}, h)
	(&Device{ID: "a\r\nInjected: b", MAC: strings.Repeat("ä", 1000)}).set(h)
	require.Equal(t, "a??Injected: b "+strings.Repeat("?", 128), h.Get("X-MGOS-Device-ID"))
}
