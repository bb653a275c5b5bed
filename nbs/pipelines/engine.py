"""The engine that executes a notebook's cells in the process of its caller, for papermill."""

import base64
import io
import re
import sys

import nbformat
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from papermill.engines import Engine, papermill_engines
from traitlets.config import Config


class _Hook(DisplayHook):
    "Keeps the value of a cell's last line."

    def write_output_prompt(self):
        pass

    def write_format_data(self, data, metadata=None):
        output = nbformat.v4.new_output("execute_result", data, metadata=metadata or {}, execution_count=self.prompt_count)
        self.shell.outputs.append(output)

    def log_output(self, data):
        pass


class _Publisher(DisplayPublisher):
    "Keeps what a cell displays."

    def publish(self, data, metadata=None, **_):
        self.shell.outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata or {}))


class _Shell(InteractiveShell):
    "IPython that collects a cell's outputs in notebook form."

    displayhook_class, display_pub_class = _Hook, _Publisher

    def __init__(self, **keywords):
        self.outputs = []
        super().__init__(**keywords)
        self.display_formatter.formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", _png)

    def init_history(self):
        super().init_history()
        self.history_manager.enabled = False

    def _showtraceback(self, etype, evalue, stb):
        lines = [str(line) for line in stb]
        self.outputs.append(nbformat.v4.new_output("error", ename=etype.__name__, evalue=str(evalue), traceback=lines))


def _png(figure):
    "A matplotlib figure as PNG, which is shown everywhere: JupyterLab shows no SVG of a notebook that it does not trust."
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=80, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


class _Tee:
    "A stream that shows what is written to it, and keeps it for the notebook as a terminal would look in the end."

    def __init__(self, stream, name, outputs):
        self.stream, self.name, self.outputs, self.text = stream, name, outputs, ""

    def write(self, text):
        self.text += text
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()

    def close_output(self):
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in self.text.split("\n")]
        if text := re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(lines)):
            self.outputs.insert(0, nbformat.v4.new_output("stream", name=self.name, text=text))

    def __getattr__(self, name):
        return getattr(self.stream, name)


class InProcess(Engine):
    "A papermill engine that executes the cells in this process."

    @classmethod
    def execute_managed_notebook(cls, manager, kernel_name, **_):
        shell = _Shell.instance(config=Config(HistoryManager={"hist_file": ":memory:"}))
        for number, cell in enumerate(manager.nb.cells):
            manager.cell_start(cell, number)
            if cell.cell_type == "code" and not cls.execute_cell(shell, cell):
                manager.cell_exception(cell, number)
                manager.cell_complete(cell, number)
                break
            manager.cell_complete(cell, number)

    @staticmethod
    def execute_cell(shell, cell):
        "Run one cell; whether it went well."
        shell.outputs = outputs = []
        streams = [_Tee(sys.stdout, "stdout", outputs), _Tee(sys.stderr, "stderr", outputs)]
        kept = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = streams
        try:
            result = shell.run_cell(cell.source, store_history=True)
        finally:
            sys.stdout, sys.stderr = kept
            for stream in streams:
                stream.close_output()
        cell.outputs, cell.execution_count = list(outputs), shell.execution_count - 1
        return result.success


papermill_engines.register("in-process", InProcess)
