/* Two programs that make Wine a host to be used over SSH; tests/windows_host.py builds them.

SSHSH: what Windows' sshd does with a command: cmd.exe /c "COMMAND", unchanged. The command
comes in a variable, since Wine would quote an argument once more.

SCHTASKS: Windows' program of that name, as far as it is used here, for Wine's own does
nothing. Its tasks lie in the folder SCHTASKS_FOLDER. "schtasks service" is the Task
Scheduler: it runs outside of SSH, starts what /run asks for, and with "boot" first what is to
run at each start of Windows. */

#include <windows.h>
#include <stdio.h>
#include <wchar.h>

#ifdef SSHSH

int wmain(void)
{
    static wchar_t line[32768], command[32700];
    STARTUPINFOW start = {.cb = sizeof start};
    PROCESS_INFORMATION made;
    DWORD code = 1;

    if (!GetEnvironmentVariableW(L"SSH_ORIGINAL_COMMAND", command, 32700))
        return 2;
    swprintf(line, 32768, L"cmd.exe /c \"%ls\"", command);
    if (!CreateProcessW(NULL, line, NULL, NULL, TRUE, 0, NULL, NULL, &start, &made))
        return 3;
    WaitForSingleObject(made.hProcess, INFINITE);
    GetExitCodeProcess(made.hProcess, &code);
    return (int)code;
}

#else

#define RUNNING 267009
#define NEVER_RUN 267011
#define MOST 32

static wchar_t base[MAX_PATH];

static const wchar_t *file_of(const wchar_t *task, const wchar_t *end)
{
    static wchar_t file[4][MAX_PATH * 2];
    static int next;
    wchar_t *made = file[next++ % 4];

    while (*task == '\\')
        task++;
    swprintf(made, MAX_PATH * 2, L"%ls\\%ls%ls", base, task, end);
    return made;
}

static int exists(const wchar_t *file)
{
    return GetFileAttributesW(file) != INVALID_FILE_ATTRIBUTES;
}

static int fail(const wchar_t *words)
{
    fwprintf(stderr, L"ERROR: %ls\n", words);
    return 1;
}

static void note(const wchar_t *task, DWORD result)
{
    const wchar_t *part = file_of(task, L".part"), *file = file_of(task, L".result");
    FILE *out = _wfopen(part, L"wb");

    if (!out)
        return;
    fprintf(out, "%lu", result);
    fclose(out);
    for (int tries = 0; tries < 100 && !MoveFileExW(part, file, MOVEFILE_REPLACE_EXISTING); tries++)
        Sleep(10);
}

static DWORD result_of(const wchar_t *task)
{
    unsigned long found = NEVER_RUN;
    FILE *in = _wfopen(file_of(task, L".result"), L"rb");

    if (in) {
        if (fscanf(in, "%lu", &found) != 1)
            found = NEVER_RUN;
        fclose(in);
    }
    return found;
}

/* The whole definition, or NULL if it is not UTF-16 with its mark. */
static wchar_t *definition(const wchar_t *file)
{
    static wchar_t text[65536];
    FILE *in = _wfopen(file, L"rb");
    size_t count;

    if (!in)
        return NULL;
    count = fread(text, sizeof *text, 65535, in);
    fclose(in);
    text[count] = 0;
    return text[0] == 0xFEFF ? text : NULL;
}

/* What stands in the first element of that name, with its references resolved. */
static int element(const wchar_t *text, const wchar_t *name, wchar_t *out, size_t size)
{
    static const struct { const wchar_t *written; wchar_t is; } refs[] = {
        {L"&amp;", '&'}, {L"&lt;", '<'}, {L"&gt;", '>'}, {L"&quot;", '"'}, {L"&apos;", '\''}};
    wchar_t open[80], shut[80];
    const wchar_t *at, *end;
    size_t length = 0;

    swprintf(open, 80, L"<%ls>", name);
    swprintf(shut, 80, L"</%ls>", name);
    at = wcsstr(text, open);
    end = at ? wcsstr(at, shut) : NULL;
    if (!end)
        return 0;
    at += wcslen(open);
    while (at < end && length + 1 < size) {
        size_t known = 0;
        while (known < 5 && wcsncmp(at, refs[known].written, wcslen(refs[known].written)))
            known++;
        out[length++] = known < 5 ? refs[known].is : *at;
        at += known < 5 ? wcslen(refs[known].written) : 1;
    }
    out[length] = 0;
    return 1;
}

static int says(const wchar_t *text, const wchar_t *name, const wchar_t *wanted)
{
    static wchar_t found[1024];
    return element(text, name, found, 1024) && !wcscmp(found, wanted);
}

static int is_wanted(const wchar_t *question)
{
    wint_t answer;

    wprintf(L"WARNING: %ls (Y/N)? ", question);
    fflush(stdout);
    answer = getwchar(); /* as the real one: it waits for whoever holds its input open */
    return answer == 'Y' || answer == 'y';
}

static int create(const wchar_t *task, const wchar_t *xml, int is_forced)
{
    wchar_t *text;

    if (!xml)
        return fail(L"Invalid syntax. Value expected for '/xml'.");
    if (!exists(xml))
        return fail(L"The system cannot find the file specified.");
    text = definition(xml);
    if (!text)
        return fail(L"The task XML is malformed. (1,40)::ERROR: unable to switch the encoding");
    if (!wcsstr(text, L"http://schemas.microsoft.com/windows/2004/02/mit/task") ||
        !wcsstr(text, L"<Command>") || !wcsstr(text, L"<Principal "))
        return fail(L"The task XML contains a value which is incorrectly formatted.");
    if (!says(text, L"UserId", L"S-1-5-18") && !wcsstr(text, L"<LogonType>S4U</LogonType>") &&
        !wcsstr(text, L"<LogonType>InteractiveToken</LogonType>"))
        return fail(L"The user name or password is incorrect.");
    if (exists(file_of(task, L".xml")) && !is_forced &&
        !is_wanted(L"The task name already exists. Do you want to replace it"))
        return 1;
    if (!CopyFileW(xml, file_of(task, L".xml"), FALSE))
        return fail(L"Access is denied.");
    wprintf(L"SUCCESS: The scheduled task \"%ls\" has successfully been created.\n", task);
    return 0;
}

static int run(const wchar_t *task)
{
    FILE *asked = _wfopen(file_of(task, L".run"), L"wb");

    if (!asked)
        return fail(L"Access is denied.");
    fclose(asked);
    wprintf(L"SUCCESS: Attempted to run the scheduled task \"%ls\".\n", task);
    return 0;
}

/* The columns of German Windows, to be sure that nobody reads their words. */
static int query(const wchar_t *task, int is_csv)
{
    DWORD result = result_of(task);
    const wchar_t *word = result == RUNNING ? L"Wird ausgef\u00fchrt" : L"Bereit";

    wprintf(is_csv ? L"\"HOST\",\"\\%ls\",\"Nicht zutreffend\",\"%ls\",\"Nur Hintergrund\",\"%lu\"\n"
                   : L"\\%ls  Nicht zutreffend  %ls\n",
            task + (*task == '\\'), word, result);
    return 0;
}

static int erase(const wchar_t *task, int is_forced)
{
    if (!is_forced && !is_wanted(L"Are you sure you want to remove the task"))
        return 1;
    if (!DeleteFileW(file_of(task, L".xml")))
        return fail(L"Access is denied.");
    DeleteFileW(file_of(task, L".result"));
    return 0;
}

static struct { wchar_t task[MAX_PATH]; HANDLE process; } running[MOST];

static void start(const wchar_t *task)
{
    static wchar_t command[4096], arguments[16384], folder[4096], priority[16], line[24000];
    STARTUPINFOW info = {.cb = sizeof info};
    PROCESS_INFORMATION made;
    DWORD class = BELOW_NORMAL_PRIORITY_CLASS; /* 7, what a task has that asks for nothing */
    wchar_t *text = definition(file_of(task, L".xml"));
    int place = 0;

    for (int n = 0; n < MOST; n++)
        if (running[n].process && !wcscmp(running[n].task, task))
            return; /* IgnoreNew */
    while (place < MOST && running[place].process)
        place++;
    if (!text || place == MOST || !element(text, L"Command", command, 4096))
        return;
    if (!element(text, L"Arguments", arguments, 16384))
        arguments[0] = 0;
    if (element(text, L"Priority", priority, 16) && wcschr(L"456", priority[0]))
        class = NORMAL_PRIORITY_CLASS;
    swprintf(line, 24000, L"\"%ls\" %ls", command, arguments);
    if (!CreateProcessW(NULL, line, NULL, NULL, FALSE, class | CREATE_NEW_CONSOLE, NULL,
                        element(text, L"WorkingDirectory", folder, 4096) ? folder : NULL, &info,
                        &made)) {
        note(task, GetLastError());
        return;
    }
    CloseHandle(made.hThread);
    wcscpy(running[place].task, task);
    running[place].process = made.hProcess;
    note(task, RUNNING);
}

/* Calls `what` with the name of each task that has a file with that end. */
static void each(const wchar_t *end, void (*what)(const wchar_t *))
{
    WIN32_FIND_DATAW found;
    wchar_t pattern[16];
    HANDLE search;

    swprintf(pattern, 16, L"*%ls", end);
    search = FindFirstFileW(file_of(pattern, L""), &found);
    if (search == INVALID_HANDLE_VALUE)
        return;
    do {
        found.cFileName[wcslen(found.cFileName) - wcslen(end)] = 0;
        what(found.cFileName);
    } while (FindNextFileW(search, &found));
    FindClose(search);
}

static void serve(const wchar_t *task)
{
    if (DeleteFileW(file_of(task, L".run")))
        start(task);
}

static void boot(const wchar_t *task)
{
    wchar_t *text = definition(file_of(task, L".xml"));

    note(task, 0x40010004); /* it was ended from outside */
    if (text && wcsstr(text, L"<BootTrigger>"))
        start(task);
}

static void service(int is_boot)
{
    if (is_boot)
        each(L".xml", boot);
    for (;;) {
        each(L".run", serve);
        for (int n = 0; n < MOST; n++) {
            DWORD code;
            if (!running[n].process || WaitForSingleObject(running[n].process, 0))
                continue;
            GetExitCodeProcess(running[n].process, &code);
            CloseHandle(running[n].process);
            running[n].process = NULL;
            note(running[n].task, code);
        }
        Sleep(50);
    }
}

int wmain(int argc, wchar_t **argv)
{
    const wchar_t *verb = argc > 1 ? argv[1] : L"", *task = NULL, *xml = NULL;
    int is_forced = 0, is_csv = 0;

    if (!GetEnvironmentVariableW(L"SCHTASKS_FOLDER", base, MAX_PATH))
        return fail(L"SCHTASKS_FOLDER is not set.");
    if (!wcscmp(verb, L"service"))
        service(argc > 2);
    for (int n = 2; n < argc; n++) {
        int has_value = n + 1 < argc;
        if (!_wcsicmp(argv[n], L"/tn") && has_value)
            task = argv[++n];
        else if (!_wcsicmp(argv[n], L"/xml") && has_value)
            xml = argv[++n];
        else if (!_wcsicmp(argv[n], L"/fo") && has_value)
            is_csv = !_wcsicmp(argv[++n], L"csv");
        else if (!_wcsicmp(argv[n], L"/f"))
            is_forced = 1;
        else if (_wcsicmp(argv[n], L"/v") && _wcsicmp(argv[n], L"/nh"))
            return fail(L"Invalid argument/option.");
    }
    if (!task || wcspbrk(task, L"/:*?\"<>|"))
        return fail(L"Invalid syntax. Mandatory option '/tn' is missing.");
    if (!_wcsicmp(verb, L"/create"))
        return create(task, xml, is_forced);
    if (!exists(file_of(task, L".xml")))
        return fail(L"The system cannot find the file specified.");
    if (!_wcsicmp(verb, L"/run"))
        return run(task);
    if (!_wcsicmp(verb, L"/query"))
        return query(task, is_csv);
    if (!_wcsicmp(verb, L"/delete"))
        return erase(task, is_forced);
    return fail(L"Invalid argument/option.");
}

#endif
