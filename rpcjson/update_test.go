package rpcjson

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/fetch"
)

func TestUpdateByURL(t *testing.T) {
	firmware := strings.Repeat("firmware", 10000)
	var got http.Header
	mux := http.NewServeMux()
	mux.HandleFunc("/fw.zip", func(w http.ResponseWriter, r *http.Request) {
		got = r.Header
		_, _ = io.WriteString(w, firmware)
	})
	mux.HandleFunc("/same", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotModified) })
	mux.HandleFunc("/short", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "only this")
	})
	mux.HandleFunc("/partial", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusPartialContent) })
	mux.Handle("/r1", http.RedirectHandler("/fw.zip", http.StatusFound))
	mux.Handle("/r2", http.RedirectHandler("/r1", http.StatusPermanentRedirect))
	mux.Handle("/r3", http.RedirectHandler("/r2", http.StatusFound))
	mux.Handle("/r4", http.RedirectHandler("/r3", http.StatusFound))
	mux.Handle("/loop", http.RedirectHandler("/loop", http.StatusFound))
	mux.Handle("/file", http.RedirectHandler("file:///etc/passwd", http.StatusFound))
	mux.Handle("/bad", http.RedirectHandler("/forbidden", http.StatusFound))
	srv := httptest.NewServer(mux)
	defer srv.Close()

	for path, want := range map[string]string{
		"/fw.zip":  `"result":true`,
		"/r1":      `"result":true`,
		"/r3":      `"result":true`,
		"/r4":      fail(-1, "redirect refused: more than 3"),
		"/loop":    fail(-1, "redirect refused: more than 3"),
		"/file":    fail(-1, `redirect refused: not allowed: scheme \"file\": need https`),
		"/bad":     fail(-1, "redirect refused: not there"),
		"/same":    `"result":true`,
		"/short":   fail(-1, "Unexpected end of data"),
		"/missing": fail(-1, "Invalid HTTP response code: 404"),
		"/partial": fail(-1, "the answer is not the HTTP that was expected: a part without a valid Content-Range"),
	} {
		d := newFake()
		s := newTest(t, d, func(o *Options) {
			o.Fetch = &fetch.Policy{AllowHTTP: true, AllowLoopback: true}
			o.AllowURL = func(u *url.URL) error {
				if u.Path == "/forbidden" {
					return errors.New("not there")
				}
				return nil
			}
		})
		require.Equal(t, want, do(t, s, "OTA.Update", `{"url":"`+srv.URL+path+`","timeout":1,"commit_timeout":5,"ignore_same_version":true}`), path)
		ok := want == `"result":true`
		if ok && path != "/same" {
			require.Equal(t, firmware, string(d.got))
			require.Equal(t, ota.UpdateOptions{CommitTimeout: 5 * time.Second, IgnoreSameVersion: true}, d.opts)
		}
		s.mu.Lock()
		require.Equal(t, ok && path != "/same", !s.due.IsZero(), path)
		s.mu.Unlock()
		switch {
		case path == "/same":
			require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 0, "message": "Version is the same as current"`)
		case ok:
			require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 3, "message": "Update applied, rebooting"`)
		default:
			require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 2, "message": "`)
		}
	}
	require.Equal(t, "esp32_123456 240AC4123456", got.Get("X-MGOS-Device-ID"))
	require.Equal(t, "demo/1.0 (MongooseOS/2.19.1; esp32)", got.Get("User-Agent"))
	require.Equal(t, "esp32 1.0 20190923-002345/x", got.Get("X-MGOS-FW-Version"))
	require.Equal(t, "identity", got.Get("Accept-Encoding"))
}

func TestUpdateRefused(t *testing.T) {
	d := newFake()
	s := newTest(t, d, nil)
	for params, want := range map[string]string{
		``:                                                  fail(-1, "either file or url is required"),
		`{"url":"https://h/","file":"fw.zip"}`:              fail(-1, "either file or url is required"),
		`{"url":"http://h/"}`:                               fail(-1, "url: not allowed: need https"),
		`{"url":"ftp://h/"}`:                                fail(-1, `url: not allowed: scheme \"ftp\": need https`),
		`{"url":"/x"}`:                                      fail(-1, "url: bad URL: need https://"),
		`{"url":"https:///x"}`:                              fail(-1, "url: bad URL: need a host"),
		`{"url":"https://127.0.0.1/"}`:                      fail(-1, "url: address not allowed: 127.0.0.1 is loopback"),
		`{"url":"https://user:secret@h:x/"}`:                fail(-1, "url: bad URL: need https://host/path"),
		`{"file":"/etc/passwd"}`:                            fail(-1, "Updates from files are not allowed."),
		`{"url":["https://h/"]}`:                            fail(400, `url: need a string, got \"[\\\"https://h/\\\"]\"`),
		`{"url":"https://h/","timeout":"1s"}`:               fail(400, `timeout: need an integer, got \"1s\"`),
		`{"url":"https://h/","timeout":true}`:               fail(400, `timeout: need an integer, got \"true\"`),
		`{"url":"https://h/","timeout":1e3}`:                fail(400, `timeout: need an integer, got \"1e3\"`),
		`{"url":"https://h/","commit_timeout":99999999999}`: fail(400, `commit_timeout: need an integer from 0 to 2592000, got \"99999999999\"`),
	} {
		require.Equal(t, want, do(t, s, "OTA.Update", params))
	}
	d.state.Committed = false
	require.Equal(t, fail(-1, "failed to start update: the firmware is not committed yet", "not-committed"), do(t, s, "OTA.Update", `{"url":"https://h/"}`))
	d.state.Committed, d.busy = true, "snapshot"
	require.Equal(t, fail(-1, "Update is already in progress", "busy"), do(t, s, "OTA.Update", `{"url":"https://h/"}`))
	require.Empty(t, d.log())
	require.Equal(t, statusText(0, "idle", true, 0), do(t, s, "OTA.Status", ""))
}

func TestUpdateByFile(t *testing.T) {
	d := newFake()
	s := newTest(t, d, func(o *Options) {
		o.UpdateURL = "https://h/default"
		o.HTTPClient = &http.Client{
			Transport:     roundTrip(func(r *http.Request) *http.Response { return response(200, r.URL.Path) }),
			CheckRedirect: func(*http.Request, []*http.Request) error { return nil },
		}
		o.OpenFile = func(name string) (io.ReadCloser, error) {
			if name != "fw.zip" {
				return nil, errors.New("no such file")
			}
			return io.NopCloser(strings.NewReader("from file")), nil
		}
	})
	require.Equal(t, fail(-1, "no such file"), do(t, s, "OTA.Update", `{"file":"x"}`))
	d.errs["update"] = ota.ErrPlatform
	require.Equal(t, fail(-1, "the image is for another platform", "platform"), do(t, s, "OTA.Update", `{"file":"fw.zip"}`))
	delete(d.errs, "update")
	d.update = func(context.Context, io.Reader) (ota.UpdateResult, error) { return ota.UpdateResult{Same: true}, nil }
	require.Equal(t, `"result":true`, do(t, s, "OTA.Update", `{"file":"fw.zip"}`))
	d.update = nil
	require.Equal(t, `"result":true`, do(t, s, "OTA.Update", ``), "the configured URL")
	require.True(t, d.opts.IgnoreSameVersion)
	require.Equal(t, "/default", string(d.got))
	require.Equal(t, fail(-1, "failed to start update: a reboot is pending", "reboot-pending"), do(t, s, "OTA.Update", `{"file":"fw.zip"}`))
	require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 3`)
}

// The reply is held to the end, and the update does not depend on the caller.
func TestUpdateTakesLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
			_, _ = io.ReadAll(r)
			time.Sleep(time.Hour) // slow flash
			return ota.UpdateResult{Slot: 1}, nil
		}
		s := newTest(t, d, func(o *Options) {
			o.OpenFile = func(string) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("x")), nil }
		})
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		_, err := s.Call(ctx, testPeer, []byte(`{"id":1,"method":"OTA.Update","params":{"file":"x","timeout":30}}`))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, fail(-1, "Update is already in progress", "busy"), do(t, s, "OTA.Update", `{"file":"x"}`))
		require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 1`)
		time.Sleep(time.Hour)
		require.Len(t, d.rebootTimes(), 1)
		require.Equal(t, time.Hour+rebootAnyway, d.rebootTimes()[0].Sub(start))
	})
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, func(o *Options) {
			o.OpenFile = func(string) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("x")), nil }
		})
		start := time.Now()
		require.Equal(t, `"result":true`, do(t, s, "OTA.Update", `{"file":"x"}`))
		time.Sleep(time.Second)
		require.Len(t, d.rebootTimes(), 1)
		require.Equal(t, 500*time.Millisecond, d.rebootTimes()[0].Sub(start))
	})
}

// stuckBody delivers some bytes, one a second, and then nothing until closed.
type stuckBody struct {
	ctx context.Context
	n   int
}

func (b *stuckBody) Read(p []byte) (int, error) {
	if b.n == 0 {
		<-b.ctx.Done()
		return 0, b.ctx.Err()
	}
	time.Sleep(time.Second)
	b.n--
	p[0] = 'x'
	return 1, nil
}
func (b *stuckBody) Close() error { return nil }

func TestUpdateStalls(t *testing.T) {
	for name, c := range map[string]struct {
		respond func(r *http.Request) *http.Response
		total   time.Duration
		want    time.Duration
	}{
		"no answer": {func(*http.Request) *http.Response { return nil }, 0, 10 * time.Second},
		"body": {func(r *http.Request) *http.Response {
			res := response(200, "")
			res.ContentLength = -1
			res.Body = &stuckBody{r.Context(), 60}
			return res
		}, 0, 70 * time.Second},
		"total": {func(r *http.Request) *http.Response {
			res := response(200, "")
			res.ContentLength = -1
			res.Body = &stuckBody{r.Context(), 60}
			return res
		}, 65 * time.Second, 65 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTest(t, newFake(), func(o *Options) {
					o.HTTPClient = &http.Client{Transport: roundTrip(c.respond)}
					o.TotalTimeout = c.total
				})
				start := time.Now()
				require.Equal(t, fail(-1, "Update timed out"), do(t, s, "OTA.Update", `{"url":"https://h/","timeout":10}`))
				require.Equal(t, c.want, time.Since(start))
				require.Contains(t, do(t, s, "OTA.Status", ""), `{"state": 2, "message": "Update timed out"`)
				require.Equal(t, null, do(t, s, "OTA.Begin", ""), "the next update can start")
			})
		})
	}
}

func TestCloseEndsUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), func(o *Options) {
			o.HTTPClient = &http.Client{Transport: roundTrip(func(*http.Request) *http.Response { return nil })}
		})
		done := make(chan error, 1)
		go func() {
			_, err := s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.Update","params":{"url":"https://h/"}}`))
			done <- err
		}()
		synctest.Wait()
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-done, ErrClosed)
	})
}

// pulling returns a server whose downloads get body, and a function that starts
// one and returns where its reply will be.
func pulling(t *testing.T, d *fakeDevice, size int64, body func(ctx context.Context) io.ReadCloser, change func(*Options)) (s *Server, pull func() <-chan string) {
	s = newTest(t, d, func(o *Options) {
		o.HTTPClient = &http.Client{Transport: roundTrip(func(r *http.Request) *http.Response {
			res := response(200, "")
			res.ContentLength = size
			res.Body = body(r.Context())
			return res
		})}
		if change != nil {
			change(o)
		}
	})
	return s, func() <-chan string {
		reply := make(chan string, 1)
		go func() { reply <- do(t, s, "OTA.Update", `{"url":"https://h/"}`) }()
		synctest.Wait()
		return reply
	}
}

// slowly delivers a byte just before the limit for data is reached.
type slowly struct{ ctx context.Context }

func (b slowly) Read(p []byte) (int, error) {
	select {
	case <-time.After(DefaultUpdateTimeout - time.Second):
		p[0] = 'x'
		return 1, nil
	case <-b.ctx.Done():
		return 0, b.ctx.Err()
	}
}
func (slowly) Close() error { return nil }

func openSlowly(ctx context.Context) io.ReadCloser { return slowly{ctx} }

// A server that hardly delivers cannot hold the device for ever.
func TestUpdateIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s, pull := pulling(t, d, -1, openSlowly, nil)
		start := time.Now()
		require.Equal(t, fail(-1, "Update timed out"), <-pull())
		require.Equal(t, 24*time.Hour, time.Since(start))
		require.Equal(t, null, do(t, s, "OTA.Begin", ""))
	})
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s, pull := pulling(t, d, -1, openSlowly, func(o *Options) { o.TotalTimeout = -1 })
		reply := pull()
		time.Sleep(365 * 24 * time.Hour)
		require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 1`)
		require.Empty(t, reply)
		require.Contains(t, do(t, s, "OTA.End", ""), `"error"`)
		require.Contains(t, <-reply, `"error"`)
	})
}

// OTA.End aborts a pull as it does a push.
func TestEndAbortsPull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
			_, err := io.ReadFull(r, make([]byte, 100))
			return ota.UpdateResult{}, err
		}
		s, pull := pulling(t, d, -1, openSlowly, nil)
		for range 2 { // the second time after a push
			reply := pull()
			time.Sleep(time.Hour)
			require.Equal(t, fail(-1, "Update not started"), write(t, s, 0, "x"))
			start := time.Now()
			require.Equal(t, fail(-1, "-13 Unexpected end of data"), do(t, s, "OTA.End", ""))
			require.Equal(t, start, time.Now())
			require.Equal(t, fail(-1, "Unexpected end of data"), <-reply)
			require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 2, "message": "Unexpected end of data"`)
			require.Equal(t, fail(-1, "Update not started"), do(t, s, "OTA.End", ""), "nothing is open")

			require.Equal(t, null, do(t, s, "OTA.Begin", ""), "the next update can start")
			require.Equal(t, null, write(t, s, 0, "x"))
			require.Equal(t, fail(-1, "-13 Unexpected end of data"), do(t, s, "OTA.End", ""))
		}
	})
}

// Progress is what came of what the server announced, else what the device says.
func TestPullProgress(t *testing.T) {
	for size, want := range map[int64]int{11: 45, -1: 25} {
		synctest.Test(t, func(t *testing.T) {
			d := newFake()
			d.progress = 0.25
			d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
				_, err := io.ReadFull(r, make([]byte, 5))
				time.Sleep(time.Minute)
				return ota.UpdateResult{Slot: 1}, err
			}
			s, pull := pulling(t, d, size, func(context.Context) io.ReadCloser {
				return io.NopCloser(strings.NewReader("hello world"))
			}, nil)
			reply := pull()
			require.Equal(t, statusText(1, "progress", true, want), do(t, s, "OTA.Status", ""))
			require.Equal(t, `"result":true`, <-reply)
			require.Equal(t, statusText(3, "Update applied, rebooting", true, 100), do(t, s, "OTA.Status", ""))
		})
	}
	d := newFake()
	d.busy, d.progress = "update", 0.5
	require.Equal(t, statusText(1, "progress", true, 50), do(t, newTest(t, d, nil), "OTA.Status", ""), "one that the program itself started")
}

// broken ends with an error.
type broken struct{ io.Reader }

func (b broken) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err == io.EOF {
		err = syscall.ECONNRESET
	}
	return n, err
}
func (broken) Close() error { return nil }

// ranged answers requests for ranges of data. Every connection but every third
// breaks in the middle.
func ranged(t testing.TB, data string, asked *[]string) roundTrip {
	return func(r *http.Request) *http.Response {
		*asked = append(*asked, r.Header.Get("Range"))
		var first, last int
		_, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
		require.NoError(t, err)
		last = min(last, len(data)-1)
		res := response(206, data[first:last+1])
		res.Header.Set("ETag", `"x"`)
		res.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(data)))
		if len(*asked)%3 != 0 && len(*asked) > 1 {
			require.Equal(t, `"x"`, r.Header.Get("If-Range"))
			res.Body = broken{strings.NewReader(data[first : first+(last+1-first)/2])}
		}
		return res
	}
}

// A broken connection costs a request, not the update.
func TestPullResumes(t *testing.T) {
	data := strings.Repeat("firmware", 1<<18)
	synctest.Test(t, func(t *testing.T) {
		var asked []string
		d := newFake()
		s := newTest(t, d, func(o *Options) { o.HTTPClient = &http.Client{Transport: ranged(t, data, &asked)} })
		require.Equal(t, `"result":true`, do(t, s, "OTA.Update", `{"url":"https://h/"}`))
		require.Equal(t, data, string(d.got))
		require.Equal(t, []string{"bytes=0-65535", "bytes=65536-2097151", "bytes=1081344-2097151"}, asked)
	})
}

// closingImage tells when it is closed.
type closingImage struct {
	fakeImage
	closed *bool
}

func (i closingImage) Close() error { *i.closed = true; return nil }

// The image chooses what of the file it reads, where the server permits that.
func TestPullRanges(t *testing.T) {
	data := strings.Repeat("firmware", 1<<18)
	for name, c := range map[string]struct {
		err    error
		ranges bool
		want   string
	}{
		"ranges":           {nil, true, data[100:200] + data[1_000_000:1_000_100]},
		"not that bundle":  {fmt.Errorf("no chunks: %w", ota.ErrUnsupported), true, data},
		"bad bundle":       {ota.ErrUnverified, true, ""},
		"not that server ": {nil, false, data},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked []string
				var closed bool
				d := newFake()
				d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
					b, err := io.ReadAll(r)
					d.got = b
					return ota.UpdateResult{Slot: 1}, err
				}
				s := newTest(t, d, func(o *Options) {
					o.HTTPClient = &http.Client{Transport: ranged(t, data, &asked)}
					if !c.ranges {
						o.HTTPClient.Transport = roundTrip(func(*http.Request) *http.Response { return response(200, data) })
					}
					o.Open = func(_ context.Context, r io.Reader) (ota.Image, error) {
						return closingImage{fakeImage{r}, &closed}, nil
					}
					o.OpenRanges = func(ctx context.Context, f *fetch.File) (ota.Image, error) {
						require.True(t, c.ranges)
						require.EqualValues(t, len(data), f.Size())
						if c.err != nil {
							return nil, c.err
						}
						r, err := f.Ranges(ctx, []ota.Range{{Off: 100, Len: 100}, {Off: 1_000_000, Len: 100}})
						return closingImage{fakeImage{r}, &closed}, err
					}
				})
				reply := do(t, s, "OTA.Update", `{"url":"https://h/"}`)
				if c.want == "" {
					require.Contains(t, reply, `"message":"the image is not authenticated","reason":"unverified"`)
					return
				}
				require.Equal(t, `"result":true`, reply)
				require.Equal(t, c.want, string(d.got))
				require.True(t, closed)
			})
		})
	}
}

// counted counts how often it is closed.
type counted struct {
	io.Reader
	closed *int
}

func (c counted) Close() error { *c.closed++; return nil }

func TestDownloadIsClosed(t *testing.T) {
	for _, status := range []int{200, 304, 404} {
		for _, params := range []string{`{"url":"https://h/"}`, `{"file":"x"}`} {
			for _, err := range []error{nil, ota.ErrPlatform} {
				d := newFake()
				d.errs["update"] = err
				closed := 0
				body := counted{strings.NewReader("firmware"), &closed}
				s := newTest(t, d, func(o *Options) {
					o.OpenFile = func(string) (io.ReadCloser, error) { return body, nil }
					o.HTTPClient = &http.Client{Transport: roundTrip(func(r *http.Request) *http.Response {
						res := response(status, "")
						res.Body = body
						return res
					})}
				})
				do(t, s, "OTA.Update", params)
				require.Equal(t, 1, closed, "%d %s %v", status, params, err)
			}
		}
	}
}

// OTA.Status tells what a pull has cost, once there was one.
func TestStatusCounts(t *testing.T) {
	d := newFake()
	d.counts = ota.Counts{Downloaded: 1, Read: 2, Copied: 3, Skipped: 4, Written: 5}
	s := newTest(t, d, func(o *Options) {
		o.HTTPClient = &http.Client{Transport: roundTrip(func(*http.Request) *http.Response { return response(200, "firmware") })}
	})
	require.NotContains(t, do(t, s, "OTA.Status", ""), "downloaded")
	require.Equal(t, `"result":true`, do(t, s, "OTA.Update", `{"url":"https://h/"}`))
	require.Contains(t, do(t, s, "OTA.Status", ""), `, "downloaded": 1, "read": 2, "copied": 3, "skipped": 4, "written": 5}`)
}
