package rpcjson

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

const null = `"result":null`

func write(t testing.TB, s *Server, off int, data string) string {
	t.Helper()
	return do(t, s, "OTA.Write", fmt.Sprintf(`{"offset":%d,"data":"%s"}`, off, base64.StdEncoding.EncodeToString([]byte(data))))
}

// fail returns the error of a reply; reason may be left out.
func fail(code int, text string, reason ...string) string {
	for _, r := range reason {
		if r != "" {
			return fmt.Sprintf(`"error":{"code":%d,"message":"%s","reason":"%s"}`, code, text, r)
		}
	}
	return fmt.Sprintf(`"error":{"code":%d,"message":"%s"}`, code, text)
}

func statusText(state int, text string, committed bool, percent int) string {
	return fmt.Sprintf(`"result":{"state": %d, "message": "%s", "is_committed": %v, "progress_percent": %d, "commit_timeout": 0, "partition": 0}`,
		state, text, committed, percent)
}

func TestPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		require.Equal(t, fail(-1, "Update not started"), write(t, s, 0, "x"))
		require.Equal(t, fail(-1, "Update not started"), do(t, s, "OTA.End", ""))
		require.Equal(t, statusText(0, "idle", true, 0), do(t, s, "OTA.Status", ""))

		begin := `{"timeout":600,"commit_timeout":"300","size":11}`
		require.Equal(t, null, do(t, s, "OTA.Begin", begin))
		require.Equal(t, null, do(t, s, "OTA.Begin", begin), "a repeated Begin is acknowledged")
		require.Equal(t, fail(-1, "Update failed to start: rpcjson: an update is under way: another operation is in progress", "busy"),
			do(t, s, "OTA.Begin", strings.Replace(begin, "11", "12", 1)), "another Begin is not")
		require.Equal(t, fail(-1, "Update is already in progress", "busy"), do(t, s, "OTA.Update", `{"url":"https://h/x"}`))
		require.Equal(t, statusText(1, "progress", true, 0), do(t, s, "OTA.Status", ""))

		require.Equal(t, fail(-1, "Expected offset 0, got 5"), write(t, s, 5, "x"))
		require.Equal(t, fail(-1, "Expected offset 0, got -1"), do(t, s, "OTA.Write", `{"data":"eA=="}`))
		require.Equal(t, fail(-1, "Data required"), do(t, s, "OTA.Write", `{"offset":0}`))
		require.Equal(t, fail(400, `data: need a string in padded base64, got \"eA=\"`), do(t, s, "OTA.Write", `{"offset":0,"data":"eA="}`))
		require.Equal(t, fail(400, `offset: need an integer, got \"0.5\"`), do(t, s, "OTA.Write", `{"offset":0.5,"data":"eA=="}`))

		require.Equal(t, null, write(t, s, 0, "hello"))
		require.Equal(t, fail(-1, "Update failed to start: rpcjson: an update is under way: another operation is in progress", "busy"),
			do(t, s, "OTA.Begin", begin), "not once there is data")
		require.Equal(t, null, write(t, s, 0, "hello"), "the chunk before may be repeated")
		require.Equal(t, fail(-1, "offset 0 was already written with other data"), write(t, s, 0, "hellx"))
		require.Equal(t, fail(-1, "offset 0 was already written with other data"), write(t, s, 0, "hell"))
		require.Equal(t, null, write(t, s, 5, ""), "nothing to write")
		require.Equal(t, strings.Replace(statusText(1, "progress", true, 45), `0}`, `0, "next_offset": 5}`, 1), do(t, s, "OTA.Status", ""))
		require.Equal(t, null, write(t, s, 5, " world"))
		require.Equal(t, fail(-1, "Expected offset 11, got 0"), write(t, s, 0, "hello"), "older ones may not")

		require.Equal(t, statusText(3, "Update applied, rebooting", true, 100), do(t, s, "OTA.End", ""))
		require.Equal(t, "hello world", string(d.got))
		require.Equal(t, 300*time.Second, d.opts.CommitTimeout)
		require.Equal(t, statusText(3, "Update applied, rebooting", true, 100), do(t, s, "OTA.End", ""), "again")
		require.Equal(t, null, write(t, s, 5, " world"), "a late repetition")
		require.Equal(t, fail(-1, "1 Update applied, rebooting"), write(t, s, 11, "more"))
		require.Contains(t, do(t, s, "OTA.Begin", ""), "Update failed to start: a reboot is pending")

		done := time.Now()
		time.Sleep(400*time.Millisecond - 1)
		synctest.Wait()
		require.Contains(t, do(t, s, "OTA.GetBootState", ""), "result")
		time.Sleep(20 * time.Millisecond)
		require.Equal(t, fail(418, "shutting down in 80 ms"), do(t, s, "OTA.GetBootState", ""))
		require.Zero(t, d.rebootCount())
		time.Sleep(time.Second)
		require.Len(t, d.rebootTimes(), 1)
		require.Equal(t, 500*time.Millisecond, d.rebootTimes()[0].Sub(done))
		require.Equal(t, fail(418, "shutting down in 0 ms"), do(t, s, "OTA.GetBootState", ""))
	})
}

// In a session with a window calls may overtake each other.
func TestPushWindow(t *testing.T) {
	// begun returns a server with a session that has a window, and a function that
	// starts a call of OTA.Write, whose reply it returns a channel for.
	begun := func(t *testing.T, erase time.Duration) (*fakeDevice, *Server, func(off int, data string) chan string) {
		d := newFake()
		d.update = func(_ context.Context, r io.Reader) (res ota.UpdateResult, err error) {
			time.Sleep(erase)
			d.got, err = io.ReadAll(r)
			return res, err
		}
		s := newTest(t, d, nil)
		require.Equal(t, `"result":{"window": 3}`, do(t, s, "OTA.Begin", `{"window":9}`))
		require.Equal(t, `"result":{"window": 3}`, do(t, s, "OTA.Begin", `{"window":9}`), "a repeated Begin is acknowledged")
		return d, s, func(off int, data string) chan string {
			reply := make(chan string, 1)
			go func() { reply <- write(t, s, off, data) }()
			synctest.Wait()
			return reply
		}
	}
	test := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
	}
	test("overtaken", func(t *testing.T) {
		d, s, write := begun(t, 0)
		fourth, third, second := write(11, "!"), write(10, "d"), write(5, " worl")
		require.Equal(t, fail(-1, "Expected offset 0, got 12"), <-write(12, "?"), "no more than the window")
		require.Empty(t, fourth)
		require.Empty(t, third)
		require.Empty(t, second)
		first := write(0, "hello")
		require.Equal(t, null, <-first)
		require.Equal(t, null, <-second)
		require.Equal(t, null, <-third)
		require.Equal(t, null, <-fourth)
		require.Equal(t, null, <-write(11, "!"), "the last one may be repeated")
		require.Equal(t, fail(-1, "Expected offset 12, got 5"), <-write(5, " worl"))
		require.Equal(t, statusText(3, "Update applied, rebooting", true, 100), do(t, s, "OTA.End", ""))
		require.Equal(t, "hello world!", string(d.got))
	})
	test("ahead of the update", func(t *testing.T) {
		d, s, write := begun(t, time.Minute)
		first, second, third := write(0, "hello"), write(5, " worl"), write(10, "d")
		require.Empty(t, first, "not yet taken")
		require.Equal(t, fail(-1, "one OTA.Write at a time"), <-write(11, "!"))
		require.Equal(t, null, <-first)
		require.Equal(t, null, <-second)
		require.Equal(t, null, <-third)
		require.Equal(t, statusText(3, "Update applied, rebooting", true, 100), do(t, s, "OTA.End", ""))
		require.Equal(t, "hello world", string(d.got))
	})
	test("missing", func(t *testing.T) {
		_, s, write := begun(t, 0)
		began := time.Now()
		second := write(5, " worl")
		require.Equal(t, fail(-1, "Expected offset 0, got 5"), <-second)
		require.Equal(t, 5*time.Second, time.Since(began))
		require.Equal(t, fail(-1, fmt.Sprintf("Expected offset 0, got %d", maxWindow*s.MaxFrame()+1)), <-write(maxWindow*s.MaxFrame()+1, "x"))
		require.Equal(t, 5*time.Second, time.Since(began), "nothing that far away can be on its way")
	})
	test("ended", func(t *testing.T) {
		_, s, write := begun(t, 0)
		began := time.Now()
		second := write(5, " worl")
		require.Contains(t, do(t, s, "OTA.End", ""), `"result"`)
		require.Contains(t, <-second, `"error"`)
		require.Equal(t, began, time.Now())
	})
	test("one by one", func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		require.Equal(t, `"result":{"window": 1}`, do(t, s, "OTA.Begin", `{"window":1}`))
		began := time.Now()
		require.Equal(t, fail(-1, "Expected offset 0, got 5"), write(t, s, 5, "x"))
		require.Equal(t, began, time.Now())
	})
}

func TestPushFailure(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"digest":       {ota.ErrDigest, "-12 digest mismatch"},
		"verify":       {ota.ErrVerify, "-11 read-back differs from what was written"},
		"signature":    {ota.ErrUnverified, "-18 the image is not authenticated"},
		"bundle":       {mgosError{}, "-11 Invalid CRC"},
		"other":        {errors.New("line\nbreak"), "-1 line?break"},
		"long":         {errors.New(strings.Repeat("x", 1000)), "-1 " + strings.Repeat("x", 253) + "..."},
		"end":          {io.ErrUnexpectedEOF, "-13 Unexpected end of data"},
		"not interest": {&Error{Code: -10, Message: "Nothing interesting"}, "-10 Nothing interesting"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newFake()
				d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
					b := make([]byte, 8)
					_, err := io.ReadFull(r, b)
					if err != nil {
						return ota.UpdateResult{}, err
					}
					return ota.UpdateResult{}, fmt.Errorf("%w", c.err)
				}
				s := newTest(t, d, nil)
				require.Equal(t, null, do(t, s, "OTA.Begin", ""))
				require.Equal(t, null, write(t, s, 0, "1234"))
				code, err := strconv.Atoi(strings.Split(c.want, " ")[0])
				require.NoError(t, err)
				reason := map[string]string{"digest": "digest", "signature": "unverified"}[name]
				require.Equal(t, fail(code, c.want, reason), write(t, s, 4, "5678"), "the pending Write is told")
				require.Equal(t, fail(-1, c.want, reason), write(t, s, 8, "9"))
				require.Equal(t, fail(-1, c.want, reason), do(t, s, "OTA.End", ""))
				require.Equal(t, fail(-1, c.want, reason), do(t, s, "OTA.End", ""))
				require.Contains(t, do(t, s, "OTA.Status", ""), `{"state": 2, "message": "`+strings.SplitN(c.want, " ", 2)[1]+`"`)
				require.Equal(t, null, do(t, s, "OTA.Begin", ""), "the next update can start")
				time.Sleep(2 * time.Minute)
				require.Zero(t, d.rebootCount())
			})
		})
	}
}

type mgosError struct{}

func (mgosError) Error() string               { return "bundle: entry app.bin: CRC" }
func (mgosError) MongooseCode() (int, string) { return -11, "Invalid CRC" }

func TestPushAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
			_, err := io.ReadFull(r, make([]byte, 100))
			return ota.UpdateResult{}, err
		}
		s := newTest(t, d, nil)
		require.Equal(t, null, do(t, s, "OTA.Begin", ""))
		require.Equal(t, null, write(t, s, 0, "1234"))
		require.Equal(t, fail(-1, "-13 Unexpected end of data"), do(t, s, "OTA.End", ""))
		require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 2, "message": "Unexpected end of data"`)
	})
}

// A Write is answered when its data is consumed, not when it is received; its
// repetition waits for the same.
func TestPushFlowControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
			b := make([]byte, 4)
			for {
				_, err := r.Read(b)
				if err != nil {
					return ota.UpdateResult{Slot: 1}, nil
				}
				time.Sleep(30 * time.Second) // slow flash
			}
		}
		s := newTest(t, d, nil)
		require.Equal(t, null, do(t, s, "OTA.Begin", `{"timeout":20}`))
		start := time.Now()
		replies := make(chan string, 4)
		go func() { replies <- write(t, s, 0, "12345678") }()
		time.Sleep(20 * time.Second)
		go func() { replies <- write(t, s, 0, "12345678") }()
		require.Equal(t, null, <-replies)
		require.Equal(t, null, <-replies)
		require.Equal(t, time.Minute, time.Since(start))

		// A caller that leaves changes nothing; one more chunk may wait.
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		got, err := s.Call(ctx, testPeer, []byte(`{"id":1,"method":"OTA.Write","params":{"offset":8,"data":"AAAA"}}`))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Nil(t, got)
		go func() { replies <- write(t, s, 11, "12345678") }()
		synctest.Wait()
		require.Equal(t, fail(-1, "one OTA.Write at a time"), write(t, s, 19, "x"))
		require.Equal(t, null, <-replies)
		require.Equal(t, null, write(t, s, 19, "x"))
		require.Contains(t, do(t, s, "OTA.End", ""), `"state": 3`)
		require.Equal(t, fail(-1, "offset 19 was already written with other data"), write(t, s, 19, "y"))
	})
}

func TestPushStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, func(o *Options) { o.UpdateTimeout = time.Minute })
		require.Equal(t, null, do(t, s, "OTA.Begin", `{"timeout":10}`))
		for i := range 5 {
			time.Sleep(9 * time.Second)
			require.Equal(t, null, write(t, s, i, "x"), "progress puts the limit off")
		}
		time.Sleep(11 * time.Second)
		require.Equal(t, fail(-1, "-5 Update timed out"), write(t, s, 5, "x"))
		require.Contains(t, do(t, s, "OTA.Status", ""), `{"state": 2, "message": "Update timed out"`)
		require.Equal(t, fail(-1, "-5 Update timed out"), do(t, s, "OTA.End", ""))
		require.Equal(t, null, do(t, s, "OTA.Begin", ""), "the next update can start")
		require.Equal(t, null, write(t, s, 0, "x"))
		time.Sleep(59 * time.Second)
		require.Contains(t, do(t, s, "OTA.Status", ""), `{"state": 1`)
		time.Sleep(2 * time.Second)
		require.Contains(t, do(t, s, "OTA.Status", ""), `{"state": 2`, "the default limit")
	})
}

func TestPushTotalTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), func(o *Options) { o.TotalTimeout = 25 * time.Second })
		require.Equal(t, null, do(t, s, "OTA.Begin", `{"timeout":10}`))
		for i := range 3 {
			require.Equal(t, null, write(t, s, i, "x"))
			time.Sleep(9 * time.Second)
		}
		require.Equal(t, fail(-1, "-5 Update timed out"), write(t, s, 3, "x"))
	})
}

func TestBeginRefused(t *testing.T) {
	d := newFake()
	begin := func(s *Server, params string) string { return do(t, s, "OTA.Begin", params) }
	s := newTest(t, d, nil)
	for params, want := range map[string]string{
		`{"size":-1}`:              `size: need an integer from 0 to 92233720368547758, got \"-1\"`,
		`{"size":1e3}`:             `size: need an integer, got \"1e3\"`,
		`{"timeout":-1}`:           `timeout: need an integer from 0 to 2592000, got \"-1\"`,
		`{"commit_timeout":"abc"}`: `commit_timeout: need an integer, got \"abc\"`,
		`{"commit_timeout":1e99}`:  `commit_timeout: need an integer, got \"1e99\"`,
	} {
		require.Equal(t, fail(400, want), begin(s, params))
	}
	d.state.Committed = false
	require.Equal(t, fail(-1, "Update failed to start: the firmware is not committed yet", "not-committed"), begin(s, ""))
	d.state.Committed = true
	d.busy = "snapshot"
	require.Equal(t, fail(-1, "Update failed to start: rpcjson: snapshot is under way: another operation is in progress", "busy"), begin(s, ""))
	d.busy = ""
	d.pending = true
	require.Equal(t, fail(-1, "Update failed to start: a reboot is pending", "reboot-pending"), begin(s, ""))
	d.pending = false
	require.Equal(t, fail(-1, "Update failed to start: rpcjson: updates are switched off: not supported on this device", "unsupported"),
		begin(newTest(t, d, func(o *Options) { o.Open = nil }), ""))
	require.Empty(t, d.log())
	require.Equal(t, fail(-1, "Update not started"), do(t, s, "OTA.End", ""), "nothing was left open")
}

// The device reboots even if nobody calls OTA.End.
func TestPushWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
			_, err := io.ReadFull(r, make([]byte, 4))
			return ota.UpdateResult{Slot: 1}, err
		}
		s := newTest(t, d, nil)
		require.Equal(t, null, do(t, s, "OTA.Begin", ""))
		require.Equal(t, null, write(t, s, 0, "1234"))
		require.Equal(t, null, write(t, s, 0, "1234"))
		require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 3`)
		time.Sleep(time.Minute - 1)
		require.Zero(t, d.rebootCount())
		time.Sleep(time.Second)
		require.Equal(t, 1, d.rebootCount())
	})
}

func TestCloseEndsPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		entered := false
		d.update = func(ctx context.Context, r io.Reader) (ota.UpdateResult, error) {
			b, err := io.ReadAll(r)
			entered = bytes.Equal(b, []byte("1234")) && err != nil && ctx.Err() != nil
			return ota.UpdateResult{}, err
		}
		s := newTest(t, d, nil)
		require.Equal(t, null, do(t, s, "OTA.Begin", ""))
		require.Equal(t, null, write(t, s, 0, "1234"))
		end := make(chan error, 1)
		go func() {
			_, err := s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.Update","params":{"url":"https://x/"}}`))
			end <- err
		}()
		require.NoError(t, <-end, "busy is an answer")
		require.NoError(t, s.Close())
		require.NoError(t, s.Close(), "again")
		require.True(t, entered)
		_, err := s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.End"}`))
		require.ErrorIs(t, err, ErrClosed)
		time.Sleep(time.Hour)
		require.Zero(t, d.rebootCount())
	})
}

// A reboot that fails leaves a device that can be called.
func TestRebootFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		d.errs["reboot"] = ota.ErrUnsupported
		s := newTest(t, d, nil)
		require.Equal(t, null, do(t, s, "Sys.Reboot", `{"delay_ms":50}`))
		require.Equal(t, fail(418, "shutting down in 50 ms"), do(t, s, "Sys.Reboot", ""))
		time.Sleep(time.Second)
		require.Equal(t, 1, d.rebootCount())
		require.Equal(t, null, do(t, s, "Sys.Reboot", ""))
		time.Sleep(99 * time.Millisecond)
		require.Equal(t, 1, d.rebootCount())
		time.Sleep(2 * time.Millisecond)
		require.Equal(t, 2, d.rebootCount())
	})
}

// A device whose reboot does nothing can be called again after a while.
func TestRebootDoesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		require.Equal(t, null, do(t, s, "Sys.Reboot", `{"delay_ms":600000}`))
		time.Sleep(10*time.Minute + 59*time.Second)
		require.Equal(t, 1, d.rebootCount())
		require.Equal(t, fail(418, "shutting down in 0 ms"), do(t, s, "OTA.Status", ""))
		time.Sleep(2 * time.Second)
		require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 0`)
		require.Equal(t, null, do(t, s, "Sys.Reboot", ""))
		time.Sleep(time.Second)
		require.Equal(t, 2, d.rebootCount())
		require.NoError(t, s.Close())
	})
}

// Data that came before OTA.End is not lost.
func TestPushEndBehindData(t *testing.T) {
	for range 64 { // chance decides what is seen first
		synctest.Test(t, func(t *testing.T) {
			d := newFake()
			d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
				time.Sleep(time.Minute) // erases first
				b, err := io.ReadAll(r)
				d.got = b
				return ota.UpdateResult{Slot: 1}, err
			}
			s := newTest(t, d, nil)
			require.Equal(t, null, do(t, s, "OTA.Begin", ""))
			reply := make(chan string, 1)
			go func() { reply <- write(t, s, 0, "1234") }()
			synctest.Wait()
			require.Contains(t, do(t, s, "OTA.End", ""), `"state": 3`)
			require.Equal(t, null, <-reply)
			require.Equal(t, "1234", string(d.got))
		})
	}
}

// Whatever an error makes of its code and text, the reply is a failure, and clean.
func TestOutcome(t *testing.T) {
	for err, want := range map[error]string{
		codeError{-11, "Invalid\nCRC \u00fc\x00"}: "-11 Invalid?CRC ??",
		codeError{7, "x"}:                         "-1 x",
		codeError{1, "Update applied"}:            "-1 Update applied",
		&Error{Code: 0, Message: "y"}:             "-1 y",
	} {
		code, text := outcome(fmt.Errorf("wrapped: %w", err))
		require.Equal(t, want, fmt.Sprint(code, " ", text))
	}
}

type codeError struct {
	code int
	text string
}

func (codeError) Error() string                 { return "not this" }
func (e codeError) MongooseCode() (int, string) { return e.code, e.text }
