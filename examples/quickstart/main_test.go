package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/slotota/ota"
	"github.com/stretchr/testify/require"
)

func TestStory(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	goroutines := runtime.NumGoroutine()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out bytes.Buffer
	err := run(ctx, &screen{w: &out}, "")
	require.NoError(t, err, out.String())

	var states, boots []string
	for line := range strings.Lines(out.String()) {
		if s, ok := strings.CutPrefix(line, "  boot state  "); ok {
			states = append(states, strings.TrimSpace(s))
		}
		if s, ok := strings.CutPrefix(line, "  boot        "); ok {
			boots = append(boots, strings.TrimSpace(s))
		}
	}
	require.Equal(t, []string{
		`{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`,
		`{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 60}`,
		`{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 60}`,
		`{"active_slot": 1, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`,
		`{"active_slot": 0, "is_committed": false, "revert_slot": 1, "commit_timeout": 1}`,
		`{"active_slot": 0, "is_committed": false, "revert_slot": 1, "commit_timeout": 1}`,
		`{"active_slot": 1, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`,
		`{"active_slot": 1, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`,
		`{"active_slot": 1, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`,
	}, states)
	require.Equal(t, []string{
		"slot 0, firmware 1.0", "slot 1, firmware 1.1", "slot 0, firmware 1.2", "slot 1, firmware 1.1", "slot 1, firmware 1.1",
	}, boots)
	require.Contains(t, out.String(), "the commit timeout has expired")
	require.Contains(t, out.String(), "the power is off")
	require.Contains(t, out.String(), `answer      {"slot": 0}`)
	require.NotContains(t, out.String(), "\r", "plain lines")

	left, err := os.ReadDir(temp)
	require.NoError(t, err)
	require.Empty(t, left)
	// Connections end shortly after the answer. Eventually asks in a goroutine
	// of its own.
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+1 }, 10*time.Second, 10*time.Millisecond, "goroutines left")
}

func TestStoryInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	out := writerFunc(func(b []byte) (int, error) {
		if bytes.Contains(b, []byte("1.2 runs on trial")) {
			cancel()
		}
		return len(b), nil
	})
	require.ErrorIs(t, run(ctx, &screen{w: out}, ""), context.Canceled)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestListen(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, &screen{w: w}, "127.0.0.1:0")
		w.Close()
	}()
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			lines <- s.Text()
		}
	}()
	// await returns the lines up to one that holds text.
	await := func(text string) (all []string) {
		t.Helper()
		deadline := time.After(time.Minute)
		for {
			select {
			case line, ok := <-lines:
				require.True(t, ok, "ended before %q", text)
				all = append(all, line)
				if strings.Contains(line, text) {
					return all
				}
			case <-deadline:
				require.Fail(t, "no line with "+text)
			}
		}
	}

	// The commands are what it says they are.
	help := await("Ctrl-C")
	curl := map[string]func() string{}
	var file string
	command := regexp.MustCompile(`^  curl -d '(.*)' -H 'Content-Type: application/json' (http://\S+/rpc/(\S+))$`)
	for _, line := range help {
		if m := command.FindStringSubmatch(line); m != nil {
			curl[m[3]] = func() string { return post(t, m[2], m[1]) }
		}
		if strings.Contains(line, "/rpc ota ") {
			file = line[strings.LastIndex(line, " ")+1:]
		}
	}
	require.Len(t, curl, 3)
	require.FileExists(t, file)

	require.Equal(t, `{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`, curl["OTA.GetBootState"]())
	require.Equal(t, "true", curl["OTA.Update"]())
	await("slot 1, firmware 1.1")
	await("serving again")
	require.Equal(t, `{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 60}`, curl["OTA.GetBootState"]())
	require.Equal(t, "null", curl["OTA.Commit"]())
	require.Equal(t, `{"active_slot": 1, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`, curl["OTA.GetBootState"]())

	cancel()
	require.NoError(t, <-ended)
	require.NoFileExists(t, file)
}

func post(t *testing.T, url, body string) string {
	t.Helper()
	res, err := http.Post(url, "application/json", strings.NewReader(body))
	require.NoError(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.StatusCode, string(b))
	return strings.TrimSpace(string(b))
}

func TestScreen(t *testing.T) {
	events := []ota.Event{
		{Phase: ota.PhaseChecking},
		{Phase: ota.PhaseWriting, Slot: 1, Part: "app", Done: 1, Total: 4},
		{Phase: ota.PhaseWriting, Slot: 1, Part: "app", Done: 4, Total: 4},
		{Phase: ota.PhaseWriting, Slot: 1, Part: "fs", Done: 2, Total: 4},
		{Phase: ota.PhaseFailed, Err: errors.New("no more flash")},
	}
	show := func(terminal bool) string {
		var out strings.Builder
		s := &screen{w: &out, terminal: terminal}
		for _, e := range events {
			s.event(e)
		}
		s.printf("next\n")
		return out.String()
	}
	bar := func(n int) string { return "[" + strings.Repeat("#", n) + strings.Repeat(" ", 40-n) + "]" }
	require.Equal(t, "  writing     slot 1 app: 4 bytes\n  failed      no more flash\nnext\n", show(false))
	require.Equal(t, "\r  writing     slot 1 app "+bar(10)+"\r  writing     slot 1 app "+bar(40)+
		"\n\r  writing     slot 1 fs  "+bar(20)+"\n  failed      no more flash\nnext\n", show(true))
}
